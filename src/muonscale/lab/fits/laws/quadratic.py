"""The minimum of a U-shaped curve, such as loss by learning rate: a parabola over log x.

This is no `Law`: a parabola says nothing of points away from its minimum. Only a minimum with
higher points on both sides is returned. A curve that is lowest at its end is refused, and the
message says on which side to measure more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import CONFIDENCE, check_resamples
from muonscale.lab.fits.result import (
    FloatArray,
    Interval,
    SizeRange,
    check_count,
    check_positive,
)

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
    """The x with the lowest y of those measured."""
    sides: SizeRange
    """Range of the x that the parabola was fitted to; it includes `at`."""


def fit_minimum(x: ArrayLike, y: ArrayLike, around: int = 1, name: str = "x") -> Minimum:
    """Fit a parabola over log x to the lowest point and its neighbors.

    Args:
        x: positive values, such as learning rates. The y of equal x are averaged.
        y: values such as losses; infinite or NaN for a run that diverged.
        around: neighbors on each side. With one, the parabola goes through all three points.
        name: what x is, for messages.

    Raises:
        StudyError: for fewer than three x, a lowest y at an end or next to a diverged run, or a
            parabola without a minimum among its points.
    """
    xs, means = _average_repeats(x, y)
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
                f"the run at {name} {xs[other]:g}, next to the best one at {xs[place]:g}, "
                "diverged; measure between them"
            )
    near = _find_neighbors(means, around)
    log_x = np.log(xs[near])
    vertex = _fit_parabola(log_x, means[near])
    if vertex is None:
        raise StudyError(
            f"the parabola through the {len(log_x)} points around {name} {xs[place]:g} has no "
            "minimum among them; fit fewer of them, or measure again"
        )
    curvature, at, value = vertex
    return Minimum(
        at=float(np.exp(at)),
        value=value,
        curvature=curvature,
        points=len(log_x),
        best_measured=float(xs[place]),
        sides=SizeRange.of(xs[near]),
    )


def minimum_interval(
    x: ArrayLike,
    y: ArrayLike,
    noise: float,
    around: int = 1,
    resamples: int = 1000,
    seed: int = 0,
    level: float = CONFIDENCE,
    name: str = "x",
) -> Interval:
    """Return the x of the minimum with an interval, from curves with seed noise added.

    A curve whose lowest point is at an end counts as one with its minimum there. If the interval
    reaches an end of the measured x, the measurements do not bound the minimum on that side.

    Args:
        x: as for `fit_minimum`.
        y: as for `fit_minimum`.
        noise: standard deviation of one y over seeds.
        around: neighbors on each side.
        resamples: number of curves.
        seed: seed of the noise.
        level: part of the curves that the interval holds.
        name: what x is, for messages.

    Raises:
        StudyError: as for `fit_minimum`, and for too few resamples.
    """
    check_resamples(resamples)
    best = fit_minimum(x, y, around, name)
    xs, means = _average_repeats(x, y)
    repeats = np.array([np.isclose(np.asarray(x, np.float64), value).sum() for value in xs])
    generator = np.random.default_rng(seed)
    curves = means + noise / np.sqrt(repeats) * generator.standard_normal((resamples, len(xs)))
    lowest = []
    for curve in curves:
        place = int(np.argmin(curve))
        lowest.append(float(xs[place]))
        if place not in (0, len(xs) - 1):
            near = _find_neighbors(curve, around)
            if (vertex := _fit_parabola(np.log(xs[near]), curve[near])) is not None:
                lowest[-1] = float(np.exp(vertex[1]))
    tail = (1 - level) / 2
    low, high = np.quantile(lowest, [tail, 1 - tail])
    return Interval(best.at, float(low), float(high))


def _average_repeats(x: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return the distinct x, ascending, and the mean y at each; infinite if any run diverged."""
    (xs,), ys = check_positive(x=x), np.asarray(y, np.float64)
    if ys.shape != xs.shape:
        raise StudyError(f"x and y must have one shape, got y {ys.shape} and x {xs.shape}")
    ys = np.where(np.isfinite(ys), ys, np.inf)
    unique, place = np.unique(xs, return_inverse=True)
    check_count("a minimum", "different x", len(unique), LEAST_POINTS)
    means = np.bincount(place, weights=ys) / np.bincount(place)
    if not np.isfinite(means).any():
        raise StudyError(
            f"none of the {len(means)} points of the curve is finite, as every run diverged; "
            "measure at lower learning rates"
        )
    return unique, means


def _find_neighbors(means: FloatArray, around: int) -> slice:
    """Return where the lowest point and its finite neighbors are."""
    low = high = int(np.argmin(means))
    for _ in range(around):
        low -= low > 0 and bool(np.isfinite(means[low - 1]))
        high += high < len(means) - 1 and bool(np.isfinite(means[high + 1]))
    return slice(low, high + 1)


def _fit_parabola(log_x: FloatArray, y: FloatArray) -> tuple[float, float, float] | None:
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
