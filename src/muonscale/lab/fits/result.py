"""What every fit reports besides its parameters, and the checks that its points must pass.

`SizeRange` says where a law was measured, `Residuals` how far it misses, `FitStatus` how the search
ended. A fit that cannot be made at all raises `StudyError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from muonscale.errors import StudyError

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

LEAST_RESAMPLES = 100
"""The fewest tables or points that an interval is drawn from."""
ROUNDING = 1e-9
"""Relative error of a value that went through a logarithm and back."""


class FitStatus(StrEnum):
    """How the search for the parameters ended."""

    CONVERGED = "converged"
    """At a minimum, inside the range that the law allows."""
    BOUND_HIT = "bound hit"
    """A parameter went to the edge of its range: the points do not determine it."""
    MAX_ITERATIONS = "out of iterations"
    """The search stopped before it reached a minimum."""
    ABNORMAL = "stopped abnormally"
    """The search gave up away from a minimum."""

    @property
    def remark(self) -> str:
        """A warning for the user; empty if the fit converged."""
        return {
            FitStatus.CONVERGED: "",
            FitStatus.BOUND_HIT: "a term or an exponent went to the edge of its range: these runs "
            "do not determine it",
            FitStatus.MAX_ITERATIONS: "the search ended before a minimum: do not rely on these "
            "numbers",
            FitStatus.ABNORMAL: "the search gave up away from a minimum: do not rely on these "
            "numbers",
        }[self]


@dataclass(frozen=True)
class SizeRange:
    """The range of a quantity over the points of a fit, ends included."""

    low: float
    high: float

    @classmethod
    def of(cls, values: FloatArray) -> SizeRange:
        """Return the range of `values`."""
        return cls(float(values.min()), float(values.max()))

    def holds(self, value: float) -> bool:
        """Return whether `value` is inside. Outside, a law is extrapolated."""
        return self.low * (1 - ROUNDING) <= value <= self.high * (1 + ROUNDING)


@dataclass(frozen=True)
class Prediction:
    """The value that a law predicts, and whether the law is extrapolated there."""

    value: float
    extrapolated: bool


@dataclass(frozen=True)
class Residuals:
    """Differences between the logarithms of the measurements and of the law."""

    rms: float
    """Root of the sum of squares over `degrees`; 0.01 is about 1 % of the loss."""
    largest: float
    """Largest absolute residual."""
    degrees: int
    """Points less parameters."""

    @classmethod
    def of(cls, residuals: FloatArray, parameters: int) -> Residuals:
        """Summarize the residuals of a law with this number of parameters."""
        degrees = len(residuals) - parameters
        rms = float(np.sqrt(residuals @ residuals / degrees)) if degrees else float("nan")
        return cls(rms, float(np.abs(residuals).max()), degrees)


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float


def check_positive(**columns: ArrayLike) -> tuple[FloatArray, ...]:
    """Return the columns as float64 vectors.

    Raises:
        StudyError: if they differ in length, or a value is not positive and finite.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    if len({a.shape for a in arrays.values()}) > 1 or any(a.ndim != 1 for a in arrays.values()):
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise StudyError(f"columns must be vectors of one length, got shapes: {shapes}")
    for name, array in arrays.items():
        for place in np.flatnonzero(~(np.isfinite(array) & (array > 0)))[:1]:
            raise StudyError(
                f"{name} of point {place + 1} is {array[place]:g}; it must be positive and finite"
            )
    return tuple(arrays.values())


def check_count(law: str, what: str, count: int, least: int) -> None:
    """Raise StudyError if there are fewer than `least` of what a law needs."""
    if count < least:
        raise StudyError(f"{law} needs at least {least} {what}, got {count}")


def count_distinct(values: FloatArray) -> int:
    """Return the number of different values; values that differ by rounding count once."""
    ordered = np.sort(np.log(values))
    return int(1 + np.count_nonzero(np.diff(ordered) > ROUNDING)) if len(ordered) else 0
