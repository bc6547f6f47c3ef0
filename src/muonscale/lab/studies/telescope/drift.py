"""How the optimum of a telescope moves with the width.

At finite width it lies O(1/width) off the one at infinite width: x*(n) = x* - alpha/n + O(1/n^2)
(arXiv 2505.02222, section 3.2 and appendix J). Around its lowest place the loss of every level is
taken to be

    L = c[level, seed] + sum over h of k_h/2 * (u_h - u*_h - s_h/n)^2

with u the logarithm of a hyper-parameter and a curvature k that all widths share: fine grids cannot
tell it. Multiplied out, that is linear in k, k u* and k s, and one least-squares fit of all levels. A
loss that is steeper on one side pulls the parabola of a coarse grid more than that of a fine one:
such a difference looks like drift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import t

from muonscale.lab.fits.result import FloatArray, Interval
from muonscale.lab.studies.analysis.seed_blocks import LEVEL
from muonscale.lab.studies.telescope.levels import Level, mean

if TYPE_CHECKING:
    from muonscale.lab.studies.telescope.config import TelescopeConfig

LEAST_WIDTHS = 2


@dataclass(frozen=True)
class Drift:
    """`log optimum = u* + s / width` of one hyper-parameter, with 90 % intervals."""

    slope: Interval
    """s, in units of the width."""
    base: Interval
    """The optimum at the base width, by the fit."""
    target: Interval
    """At the target."""
    infinite: Interval
    """At infinite width."""
    moves: bool | None
    """Whether the interval of s lies off zero; None where there is none."""


@dataclass(frozen=True)
class Row:
    """One run next to the optimum of its level."""

    block: tuple[int, int]
    """Width and seed."""
    logs: tuple[float, ...]
    """Of the hyper-parameters over their first centres."""
    loss: float


def drift_of(config: TelescopeConfig, levels: Sequence[Level]) -> dict[str, Any]:
    """Return the drift of each hyper-parameter by name; None where the levels do not tell it."""
    names, rows = list(config.hyperparameters), _rows(config, levels)
    found: dict[str, Any] = dict.fromkeys(names)
    if len({row.block[0] for row in rows}) < LEAST_WIDTHS:
        return found
    design, blocks = _design(rows, config.base_width)
    losses = np.array([row.loss for row in rows])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return found
    theta = np.asarray(np.linalg.lstsq(design, losses, rcond=None)[0], np.float64)
    freedom = len(rows) - design.shape[1]
    left = losses - design @ theta
    variance = float(left @ left) / freedom if freedom else math.nan
    covariance = np.asarray(variance * np.linalg.inv(design.T @ design), np.float64)
    quantile = float(t.ppf((1 + LEVEL) / 2, freedom)) if freedom else math.nan
    for number, name in enumerate(names):
        own = slice(blocks + 3 * number, blocks + 3 * number + 3)
        found[name] = _drift(config, name, theta[own], covariance[own, own], quantile)
    return found


def _rows(config: TelescopeConfig, levels: Sequence[Level]) -> list[Row]:
    ratios = [math.log(item.ratio) for item in config.hyperparameters.values()]
    return [
        Row(
            (level.width, seed),
            tuple(float(o) * ratio for o, ratio in zip(place, ratios, strict=True)),
            loss,
        )
        for level in levels
        if level.best is not None and len(level.grid.places) > 1
        for place in level.grid.near(level.best)
        if math.isfinite(mean(level.losses[place]))
        for seed, loss in level.losses[place].items()
    ]


def _design(rows: Sequence[Row], base_width: int) -> tuple[FloatArray, int]:
    """Return a column per width and seed, then u^2/2, -u and -u base_width/n of every u."""
    blocks = sorted({row.block for row in rows})
    found = np.zeros((len(rows), len(blocks) + 3 * len(rows[0].logs)))
    for number, row in enumerate(rows):
        found[number, blocks.index(row.block)] = 1
        inverse = base_width / row.block[0]
        terms = [(u**2 / 2, -u, -u * inverse) for u in row.logs]
        found[number, len(blocks) :] = np.ravel(terms)
    return found, len(blocks)


def _drift(
    config: TelescopeConfig, name: str, theta: FloatArray, covariance: FloatArray, quantile: float
) -> dict[str, Any] | None:
    """Return the drift by curvature k, k u* and k s / base width; None where there is no valley."""
    if theta[0] <= 0:
        return None
    centre, base = config.hyperparameters[name].centre, config.base_width

    def part(weights: tuple[float, float]) -> Interval:
        return ratio_interval(np.array([0.0, *weights]), theta, covariance, quantile)

    def optimum(inverse_width: float) -> Interval:
        found = part((1.0, base * inverse_width))
        return Interval(*(centre * math.exp(v) for v in (found.value, found.low, found.high)))

    found = part((0.0, 1.0))
    slope = Interval(base * found.value, base * found.low, base * found.high)
    return asdict(
        Drift(
            slope=slope,
            base=optimum(1 / base),
            target=optimum(1 / config.target_width),
            infinite=optimum(0.0),
            moves=None if math.isnan(slope.low) else not slope.low <= 0 <= slope.high,
        )
    )


def ratio_interval(
    weights: FloatArray, theta: FloatArray, covariance: FloatArray, quantile: float
) -> Interval:
    """Return `weights @ theta / theta[0]` with Fieller's interval.

    Args:
        weights: of the numerator, `[n]`.
        theta: estimates, `[n]`; the first one above zero.
        covariance: theirs, `[n, n]`.
        quantile: Student's, of the interval.

    Returns:
        The ratio; ends of NaN where the denominator is not told from zero.
    """
    over, under = float(weights @ theta), float(theta[0])
    square = quantile**2
    v_over, v_both = weights @ covariance @ weights, weights @ covariance[:, 0]
    a = under**2 - square * covariance[0, 0]
    b = over * under - square * v_both
    c = over**2 - square * v_over
    if not a > 0:
        return Interval(over / under, math.nan, math.nan)
    half = math.sqrt(max(0.0, b**2 - a * c)) / a
    return Interval(over / under, b / a - half, b / a + half)
