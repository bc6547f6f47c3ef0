"""`S(B) = Smin + Emin/B`: steps to a loss by batch size, and the critical batch size.

McCandlish et al., arXiv 1812.06162, equation 2.11: with unlimited batch a target takes Smin steps, with the
smallest Emin tokens. Fitted by least squares of log S, as in Zhang et al., arXiv 2410.21676.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from muonscale.lab.fits.bootstrap import LEVEL, Draws, Seed
from muonscale.lab.fits.checks import distinct, enough, positive
from muonscale.lab.fits.huber import Model
from muonscale.lab.fits.log_squares import draw_log_squares, least_squares_of_logs
from muonscale.lab.fits.result import FloatArray, Prediction, Residuals, Span
from muonscale.lab.fits.status import FitStatus

NAME = "S = Smin + Emin/B"
LEAST_SIZES = 3
OVERHEAD = 0.2
LEAST_SHARE = 1e-3
"""A term with a smaller part of the steps at every batch is one that the points do not tell."""


@dataclass(frozen=True, kw_only=True)
class BatchLaw:
    """The law, and what it was fitted to."""

    least_steps: float
    """Smin"""
    least_data: float
    """Emin, in what B counts: tokens or sequences."""
    status: FitStatus
    residuals: Residuals
    batches: Span

    @property
    def theta(self) -> FloatArray:
        """The parameters as the fit has them: log Smin, log Emin."""
        return np.log([self.least_steps, self.least_data])

    @property
    def critical(self) -> Prediction:
        """The critical batch size Emin/Smin, where steps and data are both twice their least."""
        return self._batch(self.least_data / self.least_steps)

    def with_overhead(self, base: float, overhead: float = OVERHEAD) -> Prediction:
        """Return the batch size that takes `overhead` more data than `base` does (Zhang et al.)."""
        return self._batch(float(np.exp(log_overhead_batch(self.theta, base, overhead))))

    def __call__(self, batch: ArrayLike) -> FloatArray:
        """Return the steps at B, elementwise."""
        return self.least_steps + self.least_data / np.asarray(batch, np.float64)

    def predict(self, batch: float) -> Prediction:
        """Return the steps at B."""
        return Prediction(float(self(batch)), not self.batches.holds(batch))

    def _batch(self, value: float) -> Prediction:
        return Prediction(value, not self.batches.holds(value))


def fit_batch(batch: ArrayLike, steps: ArrayLike) -> BatchLaw:
    """Fit the law to runs that reached one loss.

    Args:
        batch: B of each run, `[n]`, in tokens or in sequences.
        steps: steps that it took to the loss.

    Raises:
        StudyError: for values that are not positive and finite, or fewer than three batch sizes.
    """
    batches, counts = positive(batch=batch, steps=steps)
    enough(NAME, "different batch sizes", distinct(batches), LEAST_SIZES)
    target, model = np.log(counts), log_batch_law(np.log(batches))
    theta, status = least_squares_of_logs(model, _start(batches, counts), target)
    predicted, shares = model(theta)
    told = bool((shares.max(axis=0) >= LEAST_SHARE).all())
    return BatchLaw(
        least_steps=float(np.exp(theta[0])),
        least_data=float(np.exp(theta[1])),
        status=status if told else FitStatus.BOUND_HIT,
        residuals=Residuals.of(target - predicted, len(theta)),
        batches=Span.of(batches),
    )


def draw_batch(
    law: BatchLaw,
    batch: ArrayLike,
    steps: ArrayLike,
    resamples: int = 1000,
    seed: Seed = 0,
    level: float = LEVEL,
    noise: float | None = None,
) -> Draws:
    """Refit the law to tables that might have been measured instead.

    Args:
        law: the fit to these runs.
        batch: B of each run.
        steps: steps of each run.
        resamples: number of tables.
        seed: of the draw; several numbers for one of several laws that are compared.
        level: of the intervals.
        noise: standard deviation of log S over seeds, when it is known from elsewhere; else the
            residuals are drawn anew, which takes four points.

    Raises:
        StudyError: for too few points or resamples for an interval.
    """
    batches, counts = positive(batch=batch, steps=steps)
    model = log_batch_law(np.log(batches))
    return draw_log_squares(model, law.theta, np.log(counts), resamples, seed, level, noise)


def log_batch_law(log_b: FloatArray) -> Model:
    """Return the log steps at these batches, and their Jacobian, by log Smin and log Emin."""

    def model(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        predicted = log_steps(theta, log_b)
        least = np.exp(theta[0] - predicted)
        return predicted, np.stack([least, 1 - least], axis=1)

    return model


def log_steps(theta: FloatArray, log_b: float | FloatArray) -> FloatArray:
    """Return log S of laws `[..., 2]`: `[...]` at one batch, `[..., k]` at k."""
    smin, emin = theta[..., 0], theta[..., 1]
    if np.ndim(log_b):
        smin, emin = smin[..., None], emin[..., None]
    return np.logaddexp(smin, emin - log_b)


def log_overhead_batch(theta: FloatArray, base: float, overhead: float = OVERHEAD) -> FloatArray:
    """Return the log of the batch that takes `overhead` more data than `base`, of laws `[..., 2]`.

    Data are `B S(B) = Smin B + Emin`, so it is `(1 + overhead) base + overhead Emin/Smin`.
    """
    critical = theta[..., 1] - theta[..., 0]
    return np.logaddexp(np.log((1 + overhead) * base), np.log(overhead) + critical)


def _start(batches: FloatArray, steps: FloatArray) -> FloatArray:
    columns = np.stack([np.ones_like(steps), 1 / batches], axis=1)
    terms, _ = nnls(columns / steps[:, None], np.ones_like(steps))
    least = LEAST_SHARE * np.array([steps.min(), (steps * batches).min()])
    return np.log(np.maximum(terms, least))
