"""`L = a * C^-b`: least squares of the logarithms, as in Moonlight (arXiv 2502.16982, table 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from muonscale.lab.fits.laws.base import LossLaw, Parameter
from muonscale.lab.fits.minimize import Model
from muonscale.lab.fits.result import (
    FitStatus,
    FloatArray,
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
    PARAMETERS = (Parameter("coefficient", "a"), Parameter("exponent", "b", log=False))
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
        _, X = cls.log_model(np.log(sizes))(np.zeros(2))
        theta = np.asarray(
            np.linalg.pinv(X) @ np.log(losses), np.float64
        )  # the minimum has a closed form
        return cls.from_theta(theta, FitStatus.CONVERGED, (sizes,), losses)

    @staticmethod
    def log_model(log_c: FloatArray) -> Model:
        """Return the log loss at C, which is linear in log a and b."""
        X = np.stack([np.ones_like(log_c), -log_c], axis=1)
        return lambda theta: (X @ theta, X)

    def __call__(self, size: ArrayLike) -> FloatArray:
        """Return the loss at C, elementwise."""
        return self.coefficient * np.asarray(size, np.float64) ** -self.exponent

    def refit(self, tables: FloatArray, counts: FloatArray) -> tuple[FloatArray, int]:
        """Fit the law to other losses of the same runs."""
        _, X = self.model(self.theta)
        return tables @ np.linalg.pinv(X).T, 0

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
