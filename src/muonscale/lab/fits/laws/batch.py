"""`S(B) = Smin + Emin/B`: steps to a loss by batch size, and the critical batch size.

McCandlish et al., arXiv 1812.06162, equation 2.11: with an unlimited batch a target takes Smin steps,
with the smallest Emin tokens. Fitted by least squares of log S, as in Zhang et al., arXiv 2410.21676.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from muonscale.lab.fits.bootstrap import Draws
from muonscale.lab.fits.findings import FitEstimate, estimate, format_number
from muonscale.lab.fits.laws.base import LEAST_SHARE, StepsLaw, check_bounds
from muonscale.lab.fits.minimize import Model, minimize_squares
from muonscale.lab.fits.result import (
    FloatArray,
    Prediction,
    Residuals,
    check_count,
    check_positive,
    count_distinct,
)

LEAST_SIZES = 3
OVERHEAD = 0.2


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchLaw(StepsLaw):
    """The law `S = Smin + Emin/B`."""

    NAME = "batch"
    FORMULA = "S = Smin + Emin/B"
    NOTE = "Emin and critical batch sizes are in the unit of the column of batch sizes."

    least_steps: float
    """Smin"""
    least_data: float
    """Emin, in the unit of B: tokens or sequences."""

    @classmethod
    def fit(cls, batch: ArrayLike, steps: ArrayLike) -> Self:
        """Fit the law to runs that reached one loss.

        Args:
            batch: B of each run, `[n]`, in tokens or in sequences.
            steps: steps of each run to the loss.

        Raises:
            StudyError: for values that are not positive and finite, or fewer than three batch sizes.
        """
        batches, counts = check_positive(batch=batch, steps=steps)
        check_count(cls.FORMULA, "different batch sizes", count_distinct(batches), LEAST_SIZES)
        columns = np.stack([np.ones_like(counts), 1 / batches], axis=1)
        terms, _ = nnls(columns / counts[:, None], np.ones_like(counts))
        least = LEAST_SHARE * np.array([counts.min(), (counts * batches).min()])
        start = np.log(np.maximum(terms, least))
        target, model = np.log(counts), log_batch_law(np.log(batches))
        theta, status = minimize_squares(model, start, target)
        predicted, shares = model(theta)
        status = check_bounds(status, shares)
        return cls(
            least_steps=float(np.exp(theta[0])),
            least_data=float(np.exp(theta[1])),
            status=status,
            remark=status.remark,
            residuals=Residuals.of(target - predicted, len(theta)),
            x=(batches,),
            y=counts,
        )

    @property
    def theta(self) -> FloatArray:
        """The parameters log Smin, log Emin."""
        return np.log([self.least_steps, self.least_data])

    @property
    def model(self) -> Model:
        """The log steps at the points of the fit."""
        return log_batch_law(np.log(self.x[0]))

    @property
    def critical(self) -> Prediction:
        """The critical batch size Emin/Smin, where steps and data are both twice their least."""
        size = self.least_data / self.least_steps
        return Prediction(size, not self.holds(size))

    def with_overhead(self, base: float, overhead: float = OVERHEAD) -> Prediction:
        """Return the batch size that takes `overhead` more data than `base` does (Zhang et al.)."""
        size = float(np.exp(log_overhead_batch(self.theta, base, overhead)))
        return Prediction(size, not self.holds(size))

    def __call__(self, batch: ArrayLike) -> FloatArray:
        """Return the steps at B, elementwise."""
        return self.least_steps + self.least_data / np.asarray(batch, np.float64)

    @staticmethod
    def log_value(theta: FloatArray, at: float) -> FloatArray:
        """Return log S of laws `[..., 2]` at B."""
        return np.logaddexp(theta[..., 0], theta[..., 1] - np.log(at))

    def estimates(self, draws: Draws, at: Sequence[float] = ()) -> tuple[FitEstimate, ...]:
        """Return Smin, Emin, the critical batch size, and that of 20 % more data than `at`."""
        rows = [
            estimate("Smin", draws, lambda theta: theta[..., 0], log=True),
            estimate("Emin", draws, lambda theta: theta[..., 1], log=True),
            estimate(
                "critical batch Emin/Smin",
                draws,
                lambda theta: theta[..., 1] - theta[..., 0],
                self.critical.extrapolated,
                log=True,
            ),
        ]
        for base in at or [self.ranges[0].low]:
            rows.append(
                estimate(
                    f"batch with 20 % more data than {format_number(base)}",
                    draws,
                    lambda theta, base=base: log_overhead_batch(theta, base),
                    self.with_overhead(base).extrapolated,
                    log=True,
                )
            )
        return tuple(rows)


def log_batch_law(log_b: FloatArray) -> Model:
    """Return the log steps at these batches, and their Jacobian, by log Smin and log Emin."""

    def model(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        predicted = np.logaddexp(theta[0], theta[1] - log_b)
        least = np.exp(theta[0] - predicted)
        return predicted, np.stack([least, 1 - least], axis=1)

    return model


def log_overhead_batch(theta: FloatArray, base: float, overhead: float = OVERHEAD) -> FloatArray:
    """Return the log of the batch that takes `overhead` more data than `base`, of laws `[..., 2]`.

    The data are `B S(B) = Smin B + Emin`, so it is `(1 + overhead) base + overhead Emin/Smin`.
    """
    critical = theta[..., 1] - theta[..., 0]
    return np.logaddexp(np.log((1 + overhead) * base), np.log(overhead) + critical)
