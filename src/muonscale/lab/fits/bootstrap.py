"""Intervals: tables that might have been measured instead, and what a law makes of each.

`residual_tables` draws them from the residuals of the fit, `noise_tables` from a known seed noise,
`pair_counts` by drawing the points themselves. A law refits each, and the `Draws` of that give
percentile intervals of any function of the parameters, also of two laws together (`join`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

from muonscale.errors import StudyError
from muonscale.lab.fits.result import FloatArray, Interval

LEVEL = 0.9
LEAST_DEGREES = 2
"""Points that a law with residuals must have beyond its parameters."""

Seed = int | tuple[int, ...]
Quantity = Callable[[FloatArray], FloatArray]
"""From parameters `[..., p]` to a quantity `[...]`, or to several `[..., k]`."""


@dataclass(frozen=True)
class Draws:
    """Parameters of a law, and of the same law refitted to other tables."""

    estimate: FloatArray
    """`[p]`"""
    samples: FloatArray
    """`[resamples, p]`"""
    level: float
    """Part of the tables that an interval holds; the tables were drawn for it."""
    failed: int = 0
    """Refits that did not end at a minimum; they are in `samples`, where they ended."""

    @classmethod
    def none(cls, estimate: FloatArray, level: float = LEVEL) -> Draws:
        """Return the parameters of a law that allows no intervals: their ends are NaN."""
        return cls(estimate, np.empty((0, len(estimate))), level)

    def band(self, quantity: Quantity) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return estimate and ends of the interval of a quantity, or of each of several."""
        value = quantity(self.estimate)
        if not len(self.samples):
            return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
        values = quantity(self.samples)
        tail = (1 - self.level) / 2
        # Values may be infinite, which interpolation between two of them cannot be.
        low = np.quantile(values, tail, axis=0, method="lower")
        high = np.quantile(values, 1 - tail, axis=0, method="higher")
        return value, low, high

    def interval(self, quantity: Quantity) -> Interval:
        """Return estimate and interval of one quantity."""
        value, low, high = self.band(quantity)
        return Interval(float(value), float(low), float(high))

    def parameter(self, place: int) -> Interval:
        """Return estimate and interval of one of the parameters."""
        return self.interval(lambda theta: theta[..., place])


def join(first: Draws, second: Draws) -> Draws:
    """Return the draws of two laws fitted to different runs: parameters one after the other.

    They have no intervals if one of the two has none.

    Raises:
        StudyError: if they were not drawn as often and for the same level.
    """
    estimate = np.concatenate([first.estimate, second.estimate])
    if not len(first.samples) or not len(second.samples):
        return Draws.none(estimate, first.level)
    if first.samples.shape[0] != second.samples.shape[0] or first.level != second.level:
        raise StudyError(
            "two laws must be drawn alike, got "
            f"{first.samples.shape[0]} draws at {first.level:g} and "
            f"{second.samples.shape[0]} at {second.level:g}"
        )
    return Draws(
        estimate,
        np.concatenate([first.samples, second.samples], axis=1),
        first.level,
        first.failed + second.failed,
    )


def residual_tables(
    fitted: FloatArray,
    residuals: FloatArray,
    jacobian: FloatArray,
    resamples: int,
    generator: np.random.Generator,
    level: float = LEVEL,
) -> FloatArray:
    """Return log losses of other tables, `[resamples, n]`: the law plus residuals drawn anew.

    Residuals are divided by `sqrt(1 - leverage)`, since a fit leaves less than the noise was
    (Davison and Hinkley, Bootstrap Methods and their Application, section 6.2), and stretched by the
    ratio of Student's to the normal quantile, as Hesterberg's expanded percentile interval is
    (arXiv 1411.5279, section 4.3): without both an interval from 5 points holds 79 % instead of 90.

    Args:
        fitted: log loss by the law, `[n]`.
        residuals: what was measured less that, `[n]`.
        jacobian: of `fitted` by the parameters, `[n, p]`.
        resamples: number of tables.
        generator: source of randomness.
        level: of the intervals to come.

    Raises:
        StudyError: if there are fewer than two points more than parameters.
    """
    n, p = jacobian.shape
    check_resamples(resamples)
    check_degrees(n, p)
    basis = np.linalg.qr(jacobian)[0]
    leverage = np.minimum((basis**2).sum(axis=1), 1 - 1e-9)
    noise = residuals / np.sqrt(1 - leverage)
    noise = (noise - noise.mean()) * stretch(level, n - p)
    return fitted + noise[generator.integers(0, n, (resamples, n))]


def noise_tables(
    fitted: FloatArray, noise: float, resamples: int, generator: np.random.Generator
) -> FloatArray:
    """Return log losses of other tables, `[resamples, n]`: the law plus normal noise.

    Args:
        fitted: log loss by the law, `[n]`.
        noise: standard deviation of the log loss over seeds, from runs apart from these.
        resamples: number of tables.
        generator: source of randomness.
    """
    check_resamples(resamples)
    return fitted + noise * generator.standard_normal((resamples, len(fitted)))


def pair_counts(points: int, resamples: int, generator: np.random.Generator) -> FloatArray:
    """Return how often each point is in a table drawn from the points, `[resamples, points]`."""
    check_resamples(resamples)
    return generator.multinomial(points, np.full(points, 1 / points), resamples).astype(np.float64)


def stretch(level: float, degrees: int) -> float:
    """Return Student's quantile over the normal one, at the end of an interval of this level."""
    end = (1 + level) / 2
    return float(t.ppf(end, degrees) / norm.ppf(end))


def check_degrees(points: int, parameters: int) -> None:
    """Refuse tables with too few points for an interval.

    Raises:
        StudyError: if there are fewer than two points more than parameters.
    """
    if points - parameters < LEAST_DEGREES:
        raise StudyError(
            f"an interval of a law with {parameters} parameters needs at least "
            f"{parameters + LEAST_DEGREES} points, got {points}"
        )


def check_resamples(resamples: int) -> None:
    """Refuse a number of tables that leaves the ends of an interval to chance.

    Raises:
        StudyError: if there are fewer than 100.
    """
    if resamples < LEAST_RESAMPLES:
        raise StudyError(f"resamples={resamples}: at least {LEAST_RESAMPLES} are needed")


LEAST_RESAMPLES = 100
