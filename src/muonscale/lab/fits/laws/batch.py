"""`S(B) = Smin + Emin/B`: steps to a loss by batch size, and the critical batch size.

McCandlish et al., arXiv 1812.06162, equation 2.11: with an unlimited batch a target takes Smin
steps, with the smallest Emin tokens. The fit is least squares of log S, as in Zhang et al.,
arXiv 2410.21676.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from muonscale.lab.fits.bootstrap import Draws
from muonscale.lab.fits.findings import FitEstimate, estimate_quantity, format_significant
from muonscale.lab.fits.laws.base import LEAST_SHARE, Parameter, StepsLaw, check_bounds
from muonscale.lab.fits.minimize import Model, minimize_squares
from muonscale.lab.fits.result import (
    FloatArray,
    Prediction,
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
    PARAMETERS = (Parameter("least_steps", "Smin"), Parameter("least_data", "Emin"))

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
            StudyError: for values that are not positive and finite, or fewer than three batch
            sizes.
        """
        batches, counts = check_positive(batch=batch, steps=steps)
        check_count(cls.FORMULA, "different batch sizes", count_distinct(batches), LEAST_SIZES)
        columns = np.stack([np.ones_like(counts), 1 / batches], axis=1)
        terms, _ = nnls(columns / counts[:, None], np.ones_like(counts))
        least = LEAST_SHARE * np.array([counts.min(), (counts * batches).min()])
        start = np.log(np.maximum(terms, least))
        model = cls.log_model(np.log(batches))
        theta, status = minimize_squares(model, start, np.log(counts))
        status = check_bounds(theta, status, model, terms=2)
        return cls.from_theta(theta, status, (batches,), counts)

    @staticmethod
    def log_model(log_b: FloatArray) -> Model:
        """Return the log steps at B, and their Jacobian, by log Smin and log Emin."""

        def model(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
            predicted = np.logaddexp(theta[0], theta[1] - log_b)
            least = np.exp(theta[0] - predicted)
            return predicted, np.stack([least, 1 - least], axis=1)

        return model

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
            *self.estimate_parameters(draws),
            estimate_quantity(
                "critical batch Emin/Smin",
                draws,
                lambda theta: theta[..., 1] - theta[..., 0],
                self.critical.extrapolated,
                log=True,
            ),
        ]
        for base in at or [self.ranges[0].low]:
            rows.append(
                estimate_quantity(
                    f"batch with 20 % more data than {format_significant(base)}",
                    draws,
                    lambda theta, base=base: log_overhead_batch(theta, base),
                    self.with_overhead(base).extrapolated,
                    log=True,
                )
            )
        return tuple(rows)


def log_overhead_batch(theta: FloatArray, base: float, overhead: float = OVERHEAD) -> FloatArray:
    """Return the log of the batch that takes `overhead` more data than `base`, of laws `[..., 2]`.

    The data are `B S(B) = Smin B + Emin`, so it is `(1 + overhead) base + overhead Emin/Smin`.
    """
    critical = theta[..., 1] - theta[..., 0]
    return np.logaddexp(np.log((1 + overhead) * base), np.log(overhead) + critical)
