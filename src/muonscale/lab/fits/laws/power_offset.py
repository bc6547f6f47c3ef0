"""`L = E + a * x^-b`: a loss that falls towards one that no size removes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from muonscale.errors import StudyError
from muonscale.lab.fits.laws.base import LEAST_SHARE, LossLaw, Parameter, check_bounds
from muonscale.lab.fits.laws.separable import NOTHING, search_exponents
from muonscale.lab.fits.minimize import Model, minimize_squares
from muonscale.lab.fits.result import (
    FloatArray,
    check_count,
    check_positive,
    count_distinct,
)

LEAST_SIZES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class OffsetPowerLaw(LossLaw):
    """The law `L = E + a * x^-b`."""

    NAME = "offset"
    FORMULA = "L = E + a * x^-b"
    COLUMNS = ("flops",)
    PARAMETERS = (
        Parameter("offset", "E"),
        Parameter("coefficient", "a"),
        Parameter("exponent", "b", log=False),
    )
    SIZE = "C"
    NOTE = "x is C, the FLOPs."

    offset: float
    coefficient: float
    exponent: float

    @classmethod
    def fit(cls, size: ArrayLike, loss: ArrayLike) -> Self:
        """Fit the law to runs by least squares of the logarithms.

        Args:
            size: x of each run: width, parameters, FLOPs.
            loss: loss of each run.

        Raises:
            StudyError: for values that are not positive and finite, fewer than four sizes, or a
                loss that does not fall.
        """
        sizes, losses = check_positive(size=size, loss=loss)
        check_count(cls.FORMULA, "different sizes", count_distinct(sizes), LEAST_SIZES)
        log_x, target = np.log(sizes), np.log(losses)
        middle = log_x.mean()
        (exponent,), (e, a) = search_exponents([log_x - middle], losses)
        if a <= NOTHING * losses.min():
            raise StudyError(
                f"the losses do not fall with size, so {cls.FORMULA} cannot be fitted to them; "
                "take runs over a wider range of sizes"
            )
        e = max(e, LEAST_SHARE * losses.min())
        start = np.array([np.log(e), np.log(a) + exponent * middle, exponent])
        model = cls.log_model(log_x)
        theta, status = minimize_squares(model, start, target)
        status = check_bounds(theta, status, model, terms=2)
        return cls.from_theta(theta, status, (sizes,), losses)

    @staticmethod
    def log_model(log_x: FloatArray) -> Model:
        """Return the log loss at x, and its Jacobian, by log E, log a and b."""

        def model(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
            log_e, log_a, exponent = theta
            falling = log_a - exponent * log_x
            predicted = np.logaddexp(log_e, falling)
            share = np.exp(falling - predicted)
            return predicted, np.stack([np.exp(log_e - predicted), share, -share * log_x], axis=1)

        return model

    def __call__(self, size: ArrayLike) -> FloatArray:
        """Return the loss at x, elementwise."""
        return self.offset + self.coefficient * np.asarray(size, np.float64) ** -self.exponent

    @staticmethod
    def log_value(theta: FloatArray, at: float) -> FloatArray:
        """Return the log loss of laws `[..., 3]` at x."""
        return np.logaddexp(theta[..., 0], theta[..., 1] - theta[..., 2] * np.log(at))

    @staticmethod
    def log_reach(theta: FloatArray, log_loss: float | FloatArray) -> FloatArray:
        """Return log x at a log loss; infinite at E or below, and for a law that does not fall."""
        above = np.exp(log_loss) - np.exp(theta[..., 0])
        reached = (above > 0) & (theta[..., 2] > 0)
        log_above = np.log(np.where(reached, above, 1))
        slope = np.where(reached, theta[..., 2], 1)
        return np.where(reached, (theta[..., 1] - log_above) / slope, np.inf)
