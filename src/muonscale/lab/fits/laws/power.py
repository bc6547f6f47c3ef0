"""`L = a * C^-b`: least squares of the logarithms, as in Moonlight (arXiv 2502.16982, table 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from muonscale.lab.fits.bootstrap import LEVEL, Draws, Seed, noise_tables, residual_tables
from muonscale.lab.fits.checks import distinct, enough, positive
from muonscale.lab.fits.result import FloatArray, Prediction, Residuals, Span
from muonscale.lab.fits.status import FitStatus

NAME = "L = a * C^-b"
LEAST_SIZES = 3


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """The law, and what it was fitted to. A negative exponent says that the loss rises with C."""

    coefficient: float
    exponent: float
    status: FitStatus
    """Always converged: the minimum has a closed form."""
    residuals: Residuals
    sizes: Span
    """Range of C."""
    losses: Span

    @property
    def theta(self) -> FloatArray:
        """The parameters as the fit has them: log a, b."""
        return np.array([np.log(self.coefficient), self.exponent])

    def __call__(self, size: ArrayLike) -> FloatArray:
        """Return the loss at C, elementwise."""
        return self.coefficient * np.asarray(size, np.float64) ** -self.exponent

    def predict(self, size: float) -> Prediction:
        """Return the loss at C."""
        return Prediction(float(self(size)), not self.sizes.holds(size))

    def reach(self, loss: float) -> Prediction:
        """Return the C at which the law has this loss."""
        size = float(np.exp(log_reach(self.theta, float(np.log(loss)))))
        return Prediction(size, not self.sizes.holds(size))


def fit_power(size: ArrayLike, loss: ArrayLike) -> PowerLaw:
    """Fit the law to runs.

    Args:
        size: C of each run (FLOPs, or another measure of size), `[n]`.
        loss: loss of each run.

    Raises:
        StudyError: for values that are not positive and finite, or fewer than three sizes.
    """
    sizes, losses = _checked(size, loss)
    theta = np.linalg.pinv(_design(sizes)) @ np.log(losses)
    return PowerLaw(
        coefficient=float(np.exp(theta[0])),
        exponent=float(theta[1]),
        status=FitStatus.CONVERGED,
        residuals=Residuals.of(np.log(losses) - _design(sizes) @ theta, len(theta)),
        sizes=Span.of(sizes),
        losses=Span.of(losses),
    )


def draw_power(
    size: ArrayLike,
    loss: ArrayLike,
    resamples: int = 1000,
    seed: Seed = 0,
    level: float = LEVEL,
    noise: float | None = None,
) -> Draws:
    """Refit the law to tables that might have been measured instead.

    Args:
        size: C of each run, `[n]`.
        loss: loss of each run.
        resamples: number of tables.
        seed: of the draw; several numbers for one of several laws that are compared.
        level: of the intervals.
        noise: standard deviation of the log loss over seeds, when it is known from elsewhere;
            else the residuals are drawn anew, which takes four points.

    Raises:
        StudyError: as for `fit_power`, and for too few points or resamples for an interval.
    """
    sizes, losses = _checked(size, loss)
    X, target = _design(sizes), np.log(losses)
    inverse = np.linalg.pinv(X)
    theta = np.asarray(inverse @ target, np.float64)
    fitted, generator = X @ theta, np.random.default_rng(seed)
    if noise is None:
        tables = residual_tables(fitted, target - fitted, X, resamples, generator, level)
    else:
        tables = noise_tables(fitted, noise, resamples, generator)
    return Draws(theta, tables @ inverse.T, level)


def log_loss(theta: FloatArray, size: float) -> FloatArray:
    """Return the log loss of laws `[..., 2]` at C."""
    return theta[..., 0] - theta[..., 1] * np.log(size)


def log_reach(theta: FloatArray, log_loss: float | FloatArray) -> FloatArray:
    """Return log C at which laws `[..., 2]` have a log loss; infinite for one that does not fall."""
    falls = theta[..., 1] > 0
    return np.where(falls, (theta[..., 0] - log_loss) / np.where(falls, theta[..., 1], 1), np.inf)


def _checked(size: ArrayLike, loss: ArrayLike) -> tuple[FloatArray, FloatArray]:
    sizes, losses = positive(size=size, loss=loss)
    enough(NAME, "different sizes", distinct(sizes), LEAST_SIZES)
    return sizes, losses


def _design(sizes: FloatArray) -> FloatArray:
    return np.stack([np.ones_like(sizes), -np.log(sizes)], axis=1)
