"""Whether the ratio of two optimizers' tokens falls anywhere when the batch grows.

Practical Efficiency of Muon, arXiv 2505.02222, section 3.2, says of `R(B) = T_AdamW(B) / T_Muon(B)` that
it is non-decreasing. A finite table cannot prove that; `rising` says what it tells.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from muonscale.lab.fits.bootstrap import LEVEL
from muonscale.lab.fits.checks import distinct, enough, positive
from muonscale.lab.fits.multiple import holm
from muonscale.lab.fits.result import ROUNDING, FloatArray, Interval

SIGNIFICANT = 0.05
LEAST_SIZES = 2


@dataclass(frozen=True, kw_only=True)
class Drop:
    """How much lower the ratio is at a larger batch."""

    start: float
    end: float
    """The two batch sizes, the smaller first."""
    size: float
    """log R(start) - log R(end)"""
    p: float
    """One-sided: the chance of a drop as large if there were none. NaN without noise to judge by."""
    p_adjusted: float
    """For the number of pairs of batch sizes, by Holm's method."""


@dataclass(frozen=True, kw_only=True)
class Rising:
    """What a table tells about the claim."""

    slope: Interval
    """Of log R over log B, by least squares."""
    drop: Drop | None
    """The largest one; None if the ratio is nowhere lower at a larger batch."""
    non_decreasing: bool | None


def rising(
    batch: ArrayLike,
    log_ratio: FloatArray,
    covariance: FloatArray,
    freedom: int,
    level: float = LEVEL,
) -> Rising:
    """Return slope, largest drop and verdict of a ratio over batch sizes.

    The claim that the ratio is non-decreasing is

    - refuted (False) if, of all pairs of batch sizes, one has a drop from the smaller to the larger
      whose one-sided p-value, adjusted for the number of pairs (Holm), is below 5 %;
    - supported (True) if none has, and the interval of the slope lies at or above 0;
    - undecided (None) otherwise, and where no noise is known.

    Args:
        batch: B, rising, `[b]`.
        log_ratio: log R at each, `[b]`.
        covariance: of `log_ratio`, `[b, b]`, the variance of the noise included.
        freedom: degrees of freedom that the noise was estimated with; 0 if it is not known.
        level: of the interval of the slope.

    Raises:
        StudyError: for batch sizes that are not positive, or fewer than two.
    """
    (batches,) = positive(batch=batch)
    enough("a slope of the ratio", "different batch sizes", distinct(batches), LEAST_SIZES)
    slope = _slope(np.log(batches), log_ratio, covariance, freedom, level)
    drops = _drops(batches, log_ratio, covariance, freedom)
    largest = max(drops, key=lambda drop: drop.size)
    drop = largest if largest.size > ROUNDING else None
    return Rising(slope=slope, drop=drop, non_decreasing=_verdict(slope, drops, freedom))


def _slope(
    log_b: FloatArray, log_ratio: FloatArray, covariance: FloatArray, freedom: int, level: float
) -> Interval:
    centred = log_b - log_b.mean()
    weights = centred / (centred @ centred)
    value = float(weights @ log_ratio)
    if freedom < 1:
        return Interval(value, np.nan, np.nan)
    error = float(np.sqrt(max(0.0, weights @ covariance @ weights)))
    half = float(student.ppf((1 + level) / 2, freedom)) * error
    return Interval(value, value - half, value + half)


def _drops(
    batches: FloatArray, log_ratio: FloatArray, covariance: FloatArray, freedom: int
) -> list[Drop]:
    """Return the change from every batch size to every larger one; a rise is a drop below zero."""
    pairs = list(itertools.combinations(range(len(batches)), 2))
    sizes = [float(log_ratio[i] - log_ratio[j]) for i, j in pairs]
    p_values = []
    for (i, j), size in zip(pairs, sizes, strict=True):
        variance = covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]
        p_values.append(_p(size, float(np.sqrt(max(0.0, variance))), freedom))
    return [
        Drop(start=float(batches[i]), end=float(batches[j]), size=size, p=p, p_adjusted=adjusted)
        for (i, j), size, p, adjusted in zip(pairs, sizes, p_values, holm(p_values), strict=True)
    ]


def _p(size: float, error: float, freedom: int) -> float:
    if freedom < 1:
        return np.nan
    if size <= ROUNDING:  # no drop: without noise its sign would be that of a rounding error
        return 1.0
    return float(student.sf(size / error, freedom)) if error else 0.0


def _verdict(slope: Interval, drops: list[Drop], freedom: int) -> bool | None:
    if freedom < 1:
        return None
    if any(drop.p_adjusted < SIGNIFICANT for drop in drops):
        return False
    return True if slope.low >= -ROUNDING else None
