"""The minimum of a U-shaped curve, such as loss by learning rate: a parabola over log x.

Only a minimum with higher points on both sides is given. A curve that is lowest at its end is
refused, and the message says on which side to measure more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import LEVEL, check_resamples
from muonscale.lab.fits.checks import enough, positive
from muonscale.lab.fits.result import FloatArray, Interval, Span

EdgeT = Literal["low", "high"]
LEAST_POINTS = 3


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """Where a curve is lowest."""

    at: float
    """x of the lowest point of the parabola."""
    value: float
    """y there."""
    curvature: float
    """Second derivative of y by the natural logarithm of x."""
    points: int
    """Number of x that the parabola was fitted to."""
    best_measured: float
    """The x that was lowest of those measured."""
    sides: Span
    """Range of the x that the parabola was fitted to; `at` lies inside."""


def edge(x: ArrayLike, y: ArrayLike) -> EdgeT | None:
    """Return at which end of the measured x the lowest y is, or None if it is at neither.

    Raises:
        StudyError: for fewer than three x, or values that cannot be used.
    """
    xs, means = _curve(x, y)
    place = int(np.argmin(means))
    if place == 0:
        return "low"
    return "high" if place == len(xs) - 1 else None


def fit_minimum(x: ArrayLike, y: ArrayLike, around: int = 1, name: str = "x") -> Minimum:
    """Fit a parabola over log x to the lowest point and its neighbours.

    Args:
        x: positive, such as learning rates; of equal ones the y are averaged.
        y: such as losses; infinite or NaN for a run that diverged.
        around: neighbours on each side; with one the parabola goes through all three points.
        name: what x is, for messages.

    Raises:
        StudyError: for fewer than three x, a lowest y at an end or next to a diverged run, or a
            parabola without a minimum among its points.
    """
    xs, means = _curve(x, y)
    _check_interior(xs, means, name)
    log_x, near = _near(xs, means, around)
    found = _parabola(log_x, means[near])
    if found is None:
        raise StudyError(
            f"the {len(log_x)} points around {name} {xs[np.argmin(means)]:g} are no valley: their "
            "parabola has no minimum among them; fit fewer of them, or measure again"
        )
    curvature, at, value = found
    return Minimum(
        at=float(np.exp(at)),
        value=float(value),
        curvature=float(curvature),
        points=len(log_x),
        best_measured=float(xs[np.argmin(means)]),
        sides=Span.of(xs[near]),
    )


def minimum_interval(
    x: ArrayLike,
    y: ArrayLike,
    noise: float,
    around: int = 1,
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
    name: str = "x",
) -> Interval:
    """Return the x of the minimum with an interval, from curves with seed noise added.

    A curve whose lowest point comes to be at an end counts as one with its minimum there, so an
    interval that reaches an end of the measured x is one that measurements do not close.

    Args:
        x: as for `fit_minimum`.
        y: as for `fit_minimum`.
        noise: standard deviation of one y over seeds.
        around: neighbours on each side.
        resamples: number of curves.
        seed: of the draw.
        level: part of the curves that the interval holds.
        name: what x is, for messages.

    Raises:
        StudyError: as for `fit_minimum`, and for too few resamples.
    """
    check_resamples(resamples)
    found = fit_minimum(x, y, around, name)
    xs, means = _curve(x, y)
    repeats = np.array([np.isclose(np.asarray(x, np.float64), value).sum() for value in xs])
    generator = np.random.default_rng(seed)
    curves = means + noise / np.sqrt(repeats) * generator.standard_normal((resamples, len(xs)))
    lowest = [_lowest(xs, curve, around) for curve in curves]
    tail = (1 - level) / 2
    low, high = np.quantile(lowest, [tail, 1 - tail])
    return Interval(found.at, float(low), float(high))


def _curve(x: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return the distinct x, ascending, and the mean y at each; infinite if any run diverged."""
    (xs,), ys = positive(x=x), np.asarray(y, np.float64)
    if ys.shape != xs.shape:
        raise StudyError(f"as many y as x are needed, got {ys.shape} and {xs.shape}")
    ys = np.where(np.isfinite(ys), ys, np.inf)
    unique, place = np.unique(xs, return_inverse=True)
    enough("a minimum", "different x", len(unique), LEAST_POINTS)
    means = np.bincount(place, weights=ys) / np.bincount(place)
    if not np.isfinite(means).any():
        raise StudyError(
            f"none of the {len(means)} points of the curve is finite, as every run diverged; measure at lower learning rates"
        )
    return unique, means


def _check_interior(xs: FloatArray, means: FloatArray, name: str) -> None:
    place = int(np.argmin(means))
    for end, where, side in ((0, "lowest", "below"), (len(xs) - 1, "highest", "above")):
        if place == end:
            raise StudyError(
                f"no interior minimum: the smallest loss is at the {where} {name}, {xs[place]:g}; "
                f"measure {side} it"
            )
    for other in (place - 1, place + 1):
        if not np.isfinite(means[other]):
            raise StudyError(
                f"the run at {name} {xs[other]:g}, next to the best one at {xs[place]:g}, diverged: "
                "a parabola needs a finite loss on both sides; measure between them"
            )


def _near(xs: FloatArray, means: FloatArray, around: int) -> tuple[FloatArray, slice]:
    """Return log x of the lowest point and its finite neighbours, and where they are."""
    low = high = int(np.argmin(means))
    for _ in range(around):
        low -= low > 0 and bool(np.isfinite(means[low - 1]))
        high += high < len(xs) - 1 and bool(np.isfinite(means[high + 1]))
    near = slice(low, high + 1)
    return np.log(xs[near]), near


def _parabola(log_x: FloatArray, y: FloatArray) -> tuple[float, float, float] | None:
    """Return second derivative, place and value of the lowest point, if it is among the points."""
    if len(log_x) < LEAST_POINTS:
        return None
    middle = log_x.mean()
    a, b, c = np.polyfit(log_x - middle, y, 2)
    if a <= 0:
        return None
    lowest = -b / (2 * a)
    if not log_x[0] <= lowest + middle <= log_x[-1]:
        return None
    return float(2 * a), float(lowest + middle), float(a * lowest**2 + b * lowest + c)


def _lowest(xs: FloatArray, means: FloatArray, around: int) -> float:
    place = int(np.argmin(means))
    if place in (0, len(xs) - 1):
        return float(xs[place])
    log_x, near = _near(xs, means, around)
    found = _parabola(log_x, means[near])
    return float(xs[place] if found is None else np.exp(found[1]))
