"""Whether the token ratio of two optimizers ever decreases as the batch grows.

Practical Efficiency of Muon, arXiv 2505.02222, section 3.2, says of the ratio of tokens that
`R(B) = T_AdamW(B) / T_Muon(B)` is non-decreasing. A finite table cannot prove that; `judge_rising`
says what the table supports.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from muonscale.lab.fits.bootstrap import CONFIDENCE
from muonscale.lab.fits.result import (
    ROUNDING,
    FloatArray,
    Interval,
    check_count,
    check_positive,
    count_distinct,
)
from muonscale.lab.fits.statistics import adjust_holm, student_quantile

SIGNIFICANT = 0.05
LEAST_SIZES = 2


@dataclass(frozen=True, kw_only=True)
class Drop:
    """How much lower the ratio is at a larger batch."""

    start: float
    """The smaller batch size."""
    end: float
    """The larger batch size."""
    size: float
    """log R(start) - log R(end)"""
    p: float
    """One-sided p-value of a drop of this size. NaN if no noise is known."""
    p_adjusted: float
    """Adjusted for the number of pairs of batch sizes, by Holm's method."""


@dataclass(frozen=True, kw_only=True)
class Rising:
    """What a table says about the claim."""

    slope: Interval
    """Slope of log R over log B, by least squares."""
    drop: Drop | None
    """The largest drop; None if the ratio is nowhere lower at a larger batch."""
    non_decreasing: bool | None


def judge_rising(
    batch: ArrayLike,
    log_ratio: FloatArray,
    covariance: FloatArray,
    freedom: int,
    level: float = CONFIDENCE,
) -> Rising:
    """Return the slope, the largest drop and the verdict of a ratio over batch sizes.

    The claim that the ratio is non-decreasing is

    - refuted (False) if, of all pairs of batch sizes, one has a drop from the smaller to the larger
      whose one-sided p-value, adjusted for the number of pairs (Holm), is below 5 %;
    - supported (True) if none has, and the interval of the slope is at or above 0;
    - undecided (None) otherwise, and if no noise is known.

    Args:
        batch: B, rising, `[b]`.
        log_ratio: log R at each B, `[b]`.
        covariance: covariance of `log_ratio`, `[b, b]`, which includes the variance of the noise.
        freedom: degrees of freedom that the noise was estimated with; 0 if it is not known.
        level: level of the interval of the slope.

    Raises:
        StudyError: for batch sizes that are not positive, or fewer than two.
    """
    (batches,) = check_positive(batch=batch)
    sizes = count_distinct(batches)
    check_count("a slope of the ratio", "different batch sizes", sizes, LEAST_SIZES)
    slope = _fit_slope(np.log(batches), log_ratio, covariance, freedom, level)
    drops = _list_drops(batches, log_ratio, covariance, freedom)
    largest = max(drops, key=lambda drop: drop.size)
    if freedom < 1:
        verdict = None
    elif any(drop.p_adjusted < SIGNIFICANT for drop in drops):
        verdict = False
    else:
        verdict = True if slope.low >= -ROUNDING else None
    drop = largest if largest.size > ROUNDING else None
    return Rising(slope=slope, drop=drop, non_decreasing=verdict)


def _fit_slope(
    log_b: FloatArray, log_ratio: FloatArray, covariance: FloatArray, freedom: int, level: float
) -> Interval:
    centered = log_b - log_b.mean()
    weights = centered / (centered @ centered)
    value = float(weights @ log_ratio)
    error = float(np.sqrt(max(0.0, weights @ covariance @ weights)))
    half = student_quantile(freedom, level) * error
    return Interval(value, value - half, value + half)


def _list_drops(
    batches: FloatArray, log_ratio: FloatArray, covariance: FloatArray, freedom: int
) -> list[Drop]:
    """Return the change from every batch size to every larger one; a rise is a drop below zero."""
    pairs = list(itertools.combinations(range(len(batches)), 2))
    sizes = [float(log_ratio[i] - log_ratio[j]) for i, j in pairs]
    p_values = []
    for (i, j), size in zip(pairs, sizes, strict=True):
        variance = covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]
        error = float(np.sqrt(max(0.0, variance)))
        if freedom < 1:
            p_values.append(np.nan)
        elif size <= ROUNDING:  # no drop: without noise its sign would be that of a rounding error
            p_values.append(1.0)
        else:
            p_values.append(float(student.sf(size / error, freedom)) if error else 0.0)
    adjusted = adjust_holm(p_values)
    return [
        Drop(start=float(batches[i]), end=float(batches[j]), size=size, p=p, p_adjusted=p_adjusted)
        for (i, j), size, p, p_adjusted in zip(pairs, sizes, p_values, adjusted, strict=True)
    ]
