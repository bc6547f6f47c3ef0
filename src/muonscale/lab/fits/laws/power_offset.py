"""`L = E + a * x^-b`: a loss that falls towards one that no size takes away."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import LEVEL, Draws, Seed
from muonscale.lab.fits.checks import distinct, enough, positive
from muonscale.lab.fits.huber import Model
from muonscale.lab.fits.laws.separable import search
from muonscale.lab.fits.log_squares import draw_log_squares, least_squares_of_logs
from muonscale.lab.fits.result import FloatArray, Prediction, Residuals, Span
from muonscale.lab.fits.status import FitStatus

NAME = "L = E + a * x^-b"
LEAST_SIZES = 4
EXPONENTS = (0.01, 3.0)
LEAST_SHARE = 1e-3
"""A term with a smaller part of the loss at every point is one that the points do not tell."""
NOTHING = 1e-9
"""A part of the loss that is rounding."""


@dataclass(frozen=True, kw_only=True)
class OffsetPowerLaw:
    """The law, and what it was fitted to."""

    offset: float
    coefficient: float
    exponent: float
    status: FitStatus
    residuals: Residuals
    sizes: Span
    """Range of x."""

    @property
    def theta(self) -> FloatArray:
        """The parameters as the fit has them: log E, log a, b."""
        return np.array([np.log(self.offset), np.log(self.coefficient), self.exponent])

    def __call__(self, size: ArrayLike) -> FloatArray:
        """Return the loss at x, elementwise."""
        return self.offset + self.coefficient * np.asarray(size, np.float64) ** -self.exponent

    def predict(self, size: float) -> Prediction:
        """Return the loss at x."""
        return Prediction(float(self(size)), not self.sizes.holds(size))


def fit_power_offset(size: ArrayLike, loss: ArrayLike) -> OffsetPowerLaw:
    """Fit the law to runs by least squares of the logarithms.

    Args:
        size: x of each run: width, parameters, FLOPs.
        loss: loss of each run.

    Raises:
        StudyError: for values that are not positive and finite, fewer than four sizes, or a loss
            that does not fall.
    """
    sizes, losses = positive(size=size, loss=loss)
    enough(NAME, "different sizes", distinct(sizes), LEAST_SIZES)
    log_x, target = np.log(sizes), np.log(losses)
    model = log_offset_law(log_x)
    theta, status = least_squares_of_logs(model, _start(log_x, losses), target)
    predicted, jacobian = model(theta)
    return OffsetPowerLaw(
        offset=float(np.exp(theta[0])),
        coefficient=float(np.exp(theta[1])),
        exponent=float(theta[2]),
        status=_bounded(theta, jacobian[:, :2], status),
        residuals=Residuals.of(target - predicted, len(theta)),
        sizes=Span.of(sizes),
    )


def draw_power_offset(
    law: OffsetPowerLaw,
    size: ArrayLike,
    loss: ArrayLike,
    resamples: int = 1000,
    seed: Seed = 0,
    level: float = LEVEL,
    noise: float | None = None,
) -> Draws:
    """Refit the law to tables that might have been measured instead.

    Args:
        law: the fit to these runs.
        size: x of each run.
        loss: loss of each run.
        resamples: number of tables.
        seed: of the draw; several numbers for one of several laws that are compared.
        level: of the intervals.
        noise: standard deviation of the log loss over seeds, when it is known from elsewhere;
            else the residuals are drawn anew, which takes five points.

    Raises:
        StudyError: for too few points or resamples for an interval.
    """
    sizes, losses = positive(size=size, loss=loss)
    model = log_offset_law(np.log(sizes))
    return draw_log_squares(model, law.theta, np.log(losses), resamples, seed, level, noise)


def log_offset_law(log_x: FloatArray) -> Model:
    """Return the log loss at these points, and its Jacobian, by log E, log a and b."""

    def model(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        log_e, log_a, exponent = theta
        falling = log_a - exponent * log_x
        predicted = np.logaddexp(log_e, falling)
        share = np.exp(falling - predicted)
        return predicted, np.stack([np.exp(log_e - predicted), share, -share * log_x], axis=1)

    return model


def _start(log_x: FloatArray, loss: FloatArray) -> FloatArray:
    middle = log_x.mean()
    (exponent,), (e, a) = search([log_x - middle], loss)
    if a <= NOTHING * loss.min():
        raise StudyError(
            f"the losses do not fall with size, so {NAME} cannot be fitted to them"
            "; take runs over a wider range of sizes"
        )
    e = max(e, LEAST_SHARE * loss.min())
    return np.array([np.log(e), np.log(a) + exponent * middle, exponent])


def _bounded(theta: FloatArray, shares: FloatArray, status: FitStatus) -> FitStatus:
    """Mark a fit whose exponent left its range, or with a term that has next to no part of any loss."""
    told = bool((shares.max(axis=0) >= LEAST_SHARE).all())
    inside = EXPONENTS[0] <= theta[2] <= EXPONENTS[1]
    return status if told and inside else FitStatus.BOUND_HIT
