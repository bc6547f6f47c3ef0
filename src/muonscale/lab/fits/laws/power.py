"""`L = a * C^-b`: least squares of the logarithms, as in Moonlight (arXiv 2502.16982, table 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from muonscale.lab.fits.bootstrap import Draws
from muonscale.lab.fits.findings import FitEstimate, estimate
from muonscale.lab.fits.laws.base import LossLaw
from muonscale.lab.fits.minimize import Model
from muonscale.lab.fits.result import (
    FitStatus,
    FloatArray,
    Residuals,
    check_count,
    check_positive,
    count_distinct,
)

LEAST_SIZES = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class PowerLaw(LossLaw):
    """The law `L = a * C^-b`. A negative exponent means that the loss rises with C."""

    NAME = "compute"
    FORMULA = "L = a * C^-b"
    COLUMNS = ("flops",)
    SIZE = "C"

    coefficient: float
    exponent: float

    @classmethod
    def fit(cls, size: ArrayLike, loss: ArrayLike) -> Self:
        """Fit the law to runs.

        Args:
            size: C of each run (FLOPs, or another measure of size), `[n]`.
            loss: loss of each run.

        Raises:
            StudyError: for values that are not positive and finite, or fewer than three sizes.
        """
        sizes, losses = check_positive(size=size, loss=loss)
        check_count(cls.FORMULA, "different sizes", count_distinct(sizes), LEAST_SIZES)
        X = _design(sizes)
        theta = np.linalg.pinv(X) @ np.log(losses)
        return cls(
            coefficient=float(np.exp(theta[0])),
            exponent=float(theta[1]),
            status=FitStatus.CONVERGED,  # the minimum has a closed form
            residuals=Residuals.of(np.log(losses) - X @ theta, len(theta)),
            x=(sizes,),
            y=losses,
        )

    @property
    def theta(self) -> FloatArray:
        """The parameters log a, b."""
        return np.array([np.log(self.coefficient), self.exponent])

    @property
    def model(self) -> Model:
        """The log loss at the points of the fit, which is linear in the parameters."""
        X = _design(self.x[0])
        return lambda theta: (X @ theta, X)

    def __call__(self, size: ArrayLike) -> FloatArray:
        """Return the loss at C, elementwise."""
        return self.coefficient * np.asarray(size, np.float64) ** -self.exponent

    def refit(self, tables: FloatArray, counts: FloatArray) -> tuple[FloatArray, int]:
        """Fit the law to other losses of the same runs."""
        return tables @ np.linalg.pinv(_design(self.x[0])).T, 0

    @staticmethod
    def log_value(theta: FloatArray, at: float) -> FloatArray:
        """Return the log loss of laws `[..., 2]` at C."""
        return theta[..., 0] - theta[..., 1] * np.log(at)

    @staticmethod
    def log_reach(theta: FloatArray, log_loss: float | FloatArray) -> FloatArray:
        """Return log C at a log loss; infinite for a law that does not fall."""
        falls = theta[..., 1] > 0
        slope = np.where(falls, theta[..., 1], 1)
        return np.where(falls, (theta[..., 0] - log_loss) / slope, np.inf)

    def estimates(self, draws: Draws, at: Sequence[float] = ()) -> tuple[FitEstimate, ...]:
        """Return a, b, and the loss at some FLOPs."""
        return (
            estimate("a", draws, lambda theta: theta[..., 0], log=True),
            estimate("b", draws, lambda theta: theta[..., 1]),
            *self.estimate_losses(draws, at),
        )


def _design(sizes: FloatArray) -> FloatArray:
    return np.stack([np.ones_like(sizes), -np.log(sizes)], axis=1)
