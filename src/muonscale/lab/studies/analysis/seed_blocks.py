"""Differences between groups of runs, with the noise of seeds.

Runs of one seed share initial weights, order of the data and validation split, so a seed that is
lucky for one group is lucky for all. The model is that of randomized blocks, with seeds as the
blocks:

    loss[group, seed] = mean[group] + effect[seed] + noise,    noise ~ N(0, sigma^2)

sigma is the same in all groups that are compared, and all of them estimate it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from scipy.stats import t as student

from muonscale.errors import StudyError
from muonscale.lab.fits.statistics import student_quantile

Group = TypeVar("Group", bound=Hashable)
CLAIM = 0.001
"""Largest one-sided p-value at which one group is called better than another: the noise rule of the
modded-nanogpt optimization track."""


@dataclass(frozen=True)
class MeanDifference:
    """A difference of means."""

    estimate: float
    low: float
    high: float
    """Ends of the 90 % interval."""
    p: float
    """One-sided: the chance of a difference as far below zero if the means were equal."""
    freedom: int


@dataclass(frozen=True)
class Blocks(Generic[Group]):
    """Groups of runs with one seed effect and one noise, fitted by least squares."""

    groups: tuple[Group, ...]
    means: tuple[float, ...]
    covariance: np.ndarray
    """Covariance [groups, groups] of the means over sigma^2, without the effects of seeds."""
    sigma: float
    """NaN without degrees of freedom."""
    freedom: int

    def mean(self, group: Group) -> float:
        """Return the mean of a group, for an average seed."""
        return self.means[self.groups.index(group)]

    def difference(self, first: Group, second: Group) -> MeanDifference:
        """Return mean(first) - mean(second), with an interval of NaN if the noise is not known."""
        contrast = np.zeros(len(self.groups))
        contrast[self.groups.index(first)] += 1
        contrast[self.groups.index(second)] -= 1
        estimate = float(contrast @ np.array(self.means))
        if self.freedom == 0:
            return MeanDifference(estimate, np.nan, np.nan, np.nan, 0)
        error = self.sigma * float(np.sqrt(max(0.0, contrast @ self.covariance @ contrast)))
        half = student_quantile(self.freedom) * error
        p = float(student.cdf(estimate / error, self.freedom)) if error else float(estimate >= 0)
        return MeanDifference(estimate, estimate - half, estimate + half, p, self.freedom)


def fit_blocks(losses: Mapping[Group, Mapping[int, float]]) -> Blocks[Group]:
    """Fit group means and seed effects.

    Args:
        losses: finite losses by group and seed; a group may lack a seed.

    Raises:
        StudyError: without any loss, or for groups that share no seed with the others.
    """
    groups = tuple(group for group, each in losses.items() if each)
    if not groups:
        raise StudyError(f"no run has finished in any of the {len(losses)} groups to compare")
    seeds = sorted({seed for group in groups for seed in losses[group]})
    rows = [
        (g, seeds.index(s), x) for g, name in enumerate(groups) for s, x in losses[name].items()
    ]
    design = np.zeros((len(rows), len(groups) + len(seeds) - 1))
    for number, (group, seed, _) in enumerate(rows):
        design[number, group] = 1
        # Effects sum to zero: the last seed's is minus the sum of the others'.
        if seed < len(seeds) - 1:
            design[number, len(groups) + seed] = 1
        else:
            design[number, len(groups) :] = -1
    values = np.array([x for *_, x in rows])
    rank = int(np.linalg.matrix_rank(design))
    if rank < design.shape[1]:
        raise StudyError(
            f"the groups {', '.join(map(str, groups))} cannot be compared seed by seed: of the "
            f"seeds {seeds} some groups share none; finish the missing runs"
        )
    found, *_ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(rows) - rank
    left = float(np.sum((values - design @ found) ** 2))
    sigma = float(np.sqrt(left / freedom)) if freedom else float("nan")
    covariance = np.linalg.inv(design.T @ design)[: len(groups), : len(groups)]
    return Blocks(groups, tuple(map(float, found[: len(groups)])), covariance, sigma, freedom)


def mean_interval(groups: Sequence[Sequence[float]], number: int) -> tuple[float, float, float]:
    """Return the mean of a group and the ends of its 90 % interval, with seed effects as noise.

    The variance over seeds is pooled over all groups; the ends are NaN if each has one run.
    """
    own = np.array(groups[number])
    freedom = sum(len(group) - 1 for group in groups)
    mean = float(own.mean())
    if freedom == 0:
        return mean, float("nan"), float("nan")
    squares = sum(float(np.sum((np.array(g) - np.mean(g)) ** 2)) for g in groups)
    half = student_quantile(freedom) * float(np.sqrt(squares / freedom / len(own)))
    return mean, mean - half, mean + half
