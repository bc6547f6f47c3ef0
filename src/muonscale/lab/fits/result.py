"""What every fit tells besides its parameters: how far it misses, and where it was measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Of a value at the end of a range, which went through a logarithm and back.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Span:
    """The range of a quantity over the points of a fit, ends included."""

    low: float
    high: float

    @classmethod
    def of(cls, values: FloatArray) -> Span:
        """Return the range of `values`."""
        return cls(float(values.min()), float(values.max()))

    def holds(self, value: float) -> bool:
        """Return whether `value` lies inside: elsewhere a law is extrapolated."""
        return self.low * (1 - ROUNDING) <= value <= self.high * (1 + ROUNDING)

    def outside(self, values: ArrayLike) -> BoolArray:
        """Return for each value whether a law is extrapolated there."""
        return np.array([not self.holds(float(v)) for v in np.atleast_1d(np.asarray(values))])


@dataclass(frozen=True)
class Prediction:
    """What a law says, and whether it says so of a place where nothing was measured."""

    value: float
    extrapolated: bool


@dataclass(frozen=True)
class Residuals:
    """Differences of the logarithm of what was measured from the logarithm of the law."""

    rms: float
    """Root of their sum of squares over `degrees`; 0.01 is about 1 % of the loss."""
    largest: float
    """The largest absolute one."""
    degrees: int
    """Points less parameters."""

    @classmethod
    def of(cls, residuals: FloatArray, parameters: int) -> Residuals:
        """Return the figures of the residuals of a law with so many parameters."""
        degrees = len(residuals) - parameters
        rms = float(np.sqrt(residuals @ residuals / degrees)) if degrees else float("nan")
        return cls(rms, float(np.abs(residuals).max()), degrees)


@dataclass(frozen=True)
class Interval:
    """An estimate between the ends of its interval."""

    value: float
    low: float
    high: float
