"""The comparison at one place: best settings, differences, cost to a baseline's loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from muonscale.errors import StudyError
from muonscale.lab.fits.statistics import adjust_holm
from muonscale.lab.studies.analysis.reach import Reach, reach
from muonscale.lab.studies.analysis.seed_blocks import CLAIM, fit_blocks, mean_interval
from muonscale.lab.studies.planned_run import Coordinate
from muonscale.lab.studies.search.variant_search import VariantSearch
from muonscale.lab.studies.study import Outcome, collect_losses

VerdictT = Literal["better", "likely better", "not significantly different", "not tuned"]


@dataclass(frozen=True)
class ComparedRuns:
    """The runs of one variant at one place."""

    search: VariantSearch
    at_best: list[Outcome]
    """The runs that are compared: those at the best setting, one for each seed."""

    @property
    def whole(self) -> bool:
        """Whether compared runs have ended and none diverged."""
        return bool(self.at_best) and all(math.isfinite(run.loss) for run in self.at_best)


@dataclass(frozen=True)
class VariantAnalysis:
    """One optimizer at one place."""

    name: str
    points: list[dict[str, Any]]
    """Settings of the search: values, losses by seed (None: diverged), their mean, the number of
    diverged runs."""
    best: dict[str, float] | None
    """Values of the best setting."""
    tuned: bool
    """Whether every neighbor of the best setting was tried and is worse."""
    edges: list[str]
    """Ends at which the best setting is, such as `lr high`."""
    loss: float = math.nan
    """Mean loss at the best setting, of the compared seeds."""
    low: float = math.nan
    high: float = math.nan
    """Ends of its 90 % interval, the luck of the seed included."""
    perplexity: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    """exp of the loss and of the ends of its interval."""
    reach: dict[str, dict[str, Reach]] = field(default_factory=dict)
    """What it spends until it has a baseline's final loss, by baseline and measure."""


@dataclass(frozen=True)
class VariantComparison:
    """Whether one variant is better than another."""

    better: str
    worse: str
    difference: float
    """Difference of losses, nats per token; below zero."""
    low: float
    high: float
    """Ends of its 90 % interval, seed by seed."""
    p: float
    """One-sided p-value."""
    p_adjusted: float
    """p-value adjusted for the number of comparisons by Holm's method."""
    verdict: VerdictT
    """`better` by the noise rule (adjusted p < 0.001); `likely better` if only the 90 % interval is
    below zero; `not tuned` if the best setting of one of the two is at an edge."""


@dataclass(frozen=True)
class CompareAnalysis:
    """The comparison at one place."""

    place: Mapping[str, Coordinate]
    variants: list[VariantAnalysis]
    comparisons: list[VariantComparison]
    sigma: float
    """Noise of a loss, without seed effects."""
    freedom: int
    notes: list[str]
    """Reasons why there is no answer."""


def analyze_place(
    place: Mapping[str, Coordinate], baselines: list[str], runs: Mapping[str, ComparedRuns]
) -> CompareAnalysis:
    """Return the comparison at a place."""
    at_best = {name: own.at_best for name, own in runs.items()}
    reached = {name: reach(at_best, name) for name in baselines if runs[name].whole}
    variants = [
        replace(
            _analyze_variant(name, runs),
            reach={base: each[name] for base, each in reached.items() if name in each},
        )
        for name in runs
    ]
    whole = {name: own for name, own in runs.items() if own.whole}
    try:
        blocks = fit_blocks({name: collect_losses(own.at_best) for name, own in whole.items()})
    except StudyError as error:
        return CompareAnalysis(place, variants, [], math.nan, 0, [str(error)])
    pairs = list(itertools.permutations(whole, 2))
    differences = [blocks.difference(a, b) for a, b in pairs]
    adjusted = adjust_holm([difference.p for difference in differences])
    comparisons = []
    for (a, b), d, p in zip(pairs, differences, adjusted, strict=True):
        if d.estimate < 0:
            tuned = whole[a].search.tuned and whole[b].search.tuned
            verdict = _judge(d.high, p) if tuned else "not tuned"
            comparisons.append(VariantComparison(a, b, d.estimate, d.low, d.high, d.p, p, verdict))
    note = "one seed gives no noise to judge differences by; give two seeds or more"
    notes = [] if blocks.freedom else [note]
    return CompareAnalysis(place, variants, comparisons, blocks.sigma, blocks.freedom, notes)


def _analyze_variant(name: str, runs: Mapping[str, ComparedRuns]) -> VariantAnalysis:
    own = runs[name]
    found = VariantAnalysis(name, **own.search.tree())
    if not own.whole:
        return found
    groups = {n: [run.loss for run in each.at_best] for n, each in runs.items() if each.whole}
    mean, low, high = mean_interval(list(groups.values()), list(groups).index(name))
    perplexity = (math.exp(mean), math.exp(low), math.exp(high))
    return replace(found, loss=mean, low=low, high=high, perplexity=perplexity)


def _judge(high: float, p: float) -> VerdictT:
    if math.isnan(p) or high >= 0:
        return "not significantly different"
    return "better" if p < CLAIM else "likely better"
