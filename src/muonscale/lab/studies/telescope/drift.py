"""How the optimum of a telescope moves with the width.

At finite width the optimum is O(1/width) away from that at infinite width: x*(n) = x* - alpha/n +
O(1/n^2) (arXiv 2505.02222, section 3.2 and appendix J). Around its lowest place the loss of every
level is taken to be

    L = c[level, seed] + sum over h of k_h/2 * (u_h - u*_h - s_h/n)^2

with u the logarithm of a hyper-parameter and a curvature k that all widths share, since fine grids
cannot determine it. Multiplied out it is linear in k, k u* and k s: one least-squares fit of all
levels. A loss that is steeper on one side pulls the parabola of a coarse grid more than that of a
fine one, and this difference looks like drift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from muonscale.lab.fits.result import FloatArray, Interval
from muonscale.lab.fits.statistics import student_quantile
from muonscale.lab.studies.telescope.config import TelescopeConfig
from muonscale.lab.studies.telescope.levels import Level, mean_loss

LEAST_WIDTHS = 2


@dataclass(frozen=True)
class Drift:
    """`log optimum = u* + s / width` of one hyper-parameter, with 90 % intervals."""

    slope: Interval
    """s, in units of the width."""
    base: Interval
    """The optimum at the base width, by the fit."""
    target: Interval
    """The optimum at the target width."""
    infinite: Interval
    """The optimum at infinite width."""
    moves: bool | None
    """Whether the interval of s excludes zero; None if there is none."""


def fit_drift(config: TelescopeConfig, levels: Sequence[Level]) -> dict[str, Any]:
    """Return the drift of each hyper-parameter by name; None if the levels do not determine it."""
    found: dict[str, Any] = dict.fromkeys(config.hyperparameters)
    ratios = [math.log(item.ratio) for item in config.hyperparameters.values()]
    rows = [
        ((level.width, seed), [float(o) * r for o, r in zip(place, ratios, strict=True)], loss)
        for level in levels
        if level.best is not None and len(level.grid.places) > 1
        for place in level.grid.near(level.best)
        if math.isfinite(mean_loss(level.losses[place]))
        for seed, loss in level.losses[place].items()
    ]
    if len({width for (width, _), *_ in rows}) < LEAST_WIDTHS:
        return found
    # Columns: one per width and seed, then u^2/2, -u and -u base_width/n of every u.
    blocks = sorted({block for block, *_ in rows})
    design = np.zeros((len(rows), len(blocks) + 3 * len(ratios)))
    for number, (block, logs, _) in enumerate(rows):
        design[number, blocks.index(block)] = 1
        inverse = config.base_width / block[0]
        design[number, len(blocks) :] = np.ravel([(u**2 / 2, -u, -u * inverse) for u in logs])
    losses = np.array([loss for *_, loss in rows])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return found
    theta = np.asarray(np.linalg.lstsq(design, losses, rcond=None)[0], np.float64)
    freedom = len(rows) - design.shape[1]
    left = losses - design @ theta
    variance = float(left @ left) / freedom if freedom else math.nan
    covariance = np.asarray(variance * np.linalg.inv(design.T @ design), np.float64)
    quantile = student_quantile(freedom)
    for number, name in enumerate(config.hyperparameters):
        own = slice(len(blocks) + 3 * number, len(blocks) + 3 * number + 3)
        if theta[own][0] > 0:  # else there is no valley
            found[name] = asdict(_drift(config, name, theta[own], covariance[own, own], quantile))
    return found


def _drift(
    config: TelescopeConfig, name: str, theta: FloatArray, covariance: FloatArray, quantile: float
) -> Drift:
    """Return the drift from curvature k, k u* and k s / base width."""
    center, base = config.hyperparameters[name].center, config.base_width

    def estimate(*weights: float) -> Interval:
        return ratio_interval(np.array([0.0, *weights]), theta, covariance, quantile)

    def optimum(inverse_width: float) -> Interval:
        found = estimate(1.0, base * inverse_width)
        return Interval(*(center * math.exp(v) for v in (found.value, found.low, found.high)))

    found = estimate(0.0, 1.0)
    slope = Interval(base * found.value, base * found.low, base * found.high)
    return Drift(
        slope=slope,
        base=optimum(1 / base),
        target=optimum(1 / config.target_width),
        infinite=optimum(0.0),
        moves=None if math.isnan(slope.low) else not slope.low <= 0 <= slope.high,
    )


def ratio_interval(
    weights: FloatArray, theta: FloatArray, covariance: FloatArray, quantile: float
) -> Interval:
    """Return `weights @ theta / theta[0]` with Fieller's interval.

    Args:
        weights: weights of the numerator, `[n]`.
        theta: estimates, `[n]`; the first is above zero.
        covariance: covariance of the estimates, `[n, n]`.
        quantile: Student's quantile of the interval.

    Returns:
        The ratio; its ends are NaN if the denominator is not significantly different from zero.
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
