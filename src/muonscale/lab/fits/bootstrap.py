"""Intervals by bootstrap: a law is refitted to tables that might have been measured instead.

`resample_residuals` makes such tables from the residuals of the fit, `add_noise` from a known noise
between seeds, and `resample_points` from the points themselves. `Draws` holds the refitted
parameters and gives percentile intervals of any function of them. `join` puts the draws of two laws
side by side, for intervals of how they compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

from muonscale.errors import StudyError
from muonscale.lab.fits.result import LEAST_RESAMPLES, FloatArray, Interval

CONFIDENCE = 0.9
"""The confidence level of all intervals."""
LEAST_DEGREES = 2
"""Points that a law with residuals must have beyond its parameters."""

Seed = int | tuple[int, ...]
Quantity = Callable[[FloatArray], FloatArray]
"""Maps parameters `[..., p]` to a quantity `[...]`, or to several `[..., k]`."""


@dataclass(frozen=True)
class Draws:
    """The parameters of a law, and those of the same law refitted to other tables."""

    estimate: FloatArray
    """`[p]`"""
    samples: FloatArray
    """`[resamples, p]`"""
    level: float
    """Part of the tables that an interval holds. The tables were drawn for this level."""
    failed: int = 0
    """Number of refits that did not end at a minimum. `samples` includes where they ended."""

    @classmethod
    def none(cls, estimate: FloatArray, level: float = CONFIDENCE) -> Draws:
        """Return the parameters of a law without intervals: their ends are NaN."""
        return cls(estimate, np.empty((0, len(estimate))), level)

    def band(self, quantity: Quantity) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the estimate and the ends of the interval of a quantity, or of each of several."""
        value = quantity(self.estimate)
        if not len(self.samples):
            return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
        values = quantity(self.samples)
        tail = (1 - self.level) / 2
        # Values may be infinite, so that quantiles must not be interpolated.
        low = np.quantile(values, tail, axis=0, method="lower")
        high = np.quantile(values, 1 - tail, axis=0, method="higher")
        return value, low, high

    def interval(self, quantity: Quantity) -> Interval:
        """Return the estimate and the interval of one quantity."""
        value, low, high = self.band(quantity)
        return Interval(float(value), float(low), float(high))

    def parameter(self, place: int) -> Interval:
        """Return the estimate and the interval of one of the parameters."""
        return self.interval(lambda theta: theta[..., place])


def join(first: Draws, second: Draws) -> Draws:
    """Return the draws of two laws of different runs, the parameters of the first law first.

    The result has no intervals if either law has none.

    Raises:
        StudyError: if the laws have different numbers of draws or levels.
    """
    estimate = np.concatenate([first.estimate, second.estimate])
    if not len(first.samples) or not len(second.samples):
        return Draws.none(estimate, first.level)
    if first.samples.shape[0] != second.samples.shape[0] or first.level != second.level:
        raise StudyError(
            "two laws need equal numbers of draws and equal levels, got "
            f"{first.samples.shape[0]} draws at {first.level:g} and "
            f"{second.samples.shape[0]} at {second.level:g}"
        )
    return Draws(
        estimate,
        np.concatenate([first.samples, second.samples], axis=1),
        first.level,
        first.failed + second.failed,
    )


def resample_residuals(
    fitted: FloatArray,
    residuals: FloatArray,
    jacobian: FloatArray,
    resamples: int,
    generator: np.random.Generator,
    level: float = CONFIDENCE,
) -> FloatArray:
    """Return log measurements of other tables, `[resamples, n]`: the law plus resampled residuals.

    Residuals are divided by `sqrt(1 - leverage)`, since a fit leaves less than the noise was
    (Davison and Hinkley, Bootstrap Methods and their Application, section 6.2), and stretched by
    the ratio of Student's to the normal quantile, as Hesterberg's expanded percentile interval is
    (arXiv 1411.5279, section 4.3). Without both, a 90 % interval from 5 points holds 79 %.

    Args:
        fitted: log of what the law predicts, `[n]`.
        residuals: log of what was measured less `fitted`, `[n]`.
        jacobian: derivatives of `fitted` by the parameters, `[n, p]`.
        resamples: number of tables.
        generator: source of randomness.
        level: level of the intervals.

    Raises:
        StudyError: if there are fewer than two points more than parameters, or too few resamples.
    """
    n, p = jacobian.shape
    check_resamples(resamples)
    check_degrees(n, p)
    basis = np.linalg.qr(jacobian)[0]
    leverage = np.minimum((basis**2).sum(axis=1), 1 - 1e-9)
    noise = residuals / np.sqrt(1 - leverage)
    noise = (noise - noise.mean()) * stretch(level, n - p)
    return fitted + noise[generator.integers(0, n, (resamples, n))]


def add_noise(
    fitted: FloatArray, noise: float, resamples: int, generator: np.random.Generator
) -> FloatArray:
    """Return log measurements of other tables, `[resamples, n]`: the law plus normal noise.

    Args:
        fitted: log of what the law predicts, `[n]`.
        noise: standard deviation of a log measurement, from runs other than these.
        resamples: number of tables.
        generator: source of randomness.
    """
    check_resamples(resamples)
    return fitted + noise * generator.standard_normal((resamples, len(fitted)))


def resample_points(points: int, resamples: int, generator: np.random.Generator) -> FloatArray:
    """Return how often each point is in tables drawn from the points, `[resamples, points]`."""
    check_resamples(resamples)
    return generator.multinomial(points, np.full(points, 1 / points), resamples).astype(np.float64)


def stretch(level: float, degrees: int) -> float:
    """Return the ratio of Student's to the normal quantile at the end of an interval."""
    end = (1 + level) / 2
    return float(t.ppf(end, degrees) / norm.ppf(end))


def check_degrees(points: int, parameters: int) -> None:
    """Raise StudyError unless there are at least two points more than parameters."""
    if points - parameters < LEAST_DEGREES:
        raise StudyError(
            f"an interval of a law with {parameters} parameters needs at least "
            f"{parameters + LEAST_DEGREES} points, got {points}"
        )


def check_resamples(resamples: int) -> None:
    """Raise StudyError for fewer than 100 tables, which leave the ends of an interval to chance."""
    if resamples < LEAST_RESAMPLES:
        raise StudyError(f"resamples={resamples}: at least {LEAST_RESAMPLES} are needed")
