"""Fits the exponent of a power law of the width, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muonscale.lab.fits.bootstrap import CONFIDENCE
from muonscale.lab.fits.statistics import student_quantile


@dataclass(frozen=True)
class Slope:
    """The exponent of a power law of the width. NaN if a value was 0 or not finite."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether the slope could be fitted."""
        return math.isfinite(self.value)


UNKNOWN = Slope(math.nan, math.nan, math.nan)


def fit_slope(
    widths: Sequence[int], values_SW: np.ndarray, confidence: float = CONFIDENCE
) -> Slope:
    """Return the slope of log value against log width, over several seeds.

    The fit is least squares with an intercept for every seed, since a seed has the same data and
    first draws at all widths. Deviations from the line, by noise or curvature, widen the interval,
    which is Student's t with S*W - S - 1 degrees of freedom.

    Args:
        widths: W different widths, at least 3.
        values_SW: values by seed and width.
        confidence: confidence level of the interval.
    """
    values_SW = np.asarray(values_SW, dtype=np.float64)
    if not (np.isfinite(values_SW) & (values_SW > 0)).all():
        return UNKNOWN
    x_W = np.log(np.asarray(widths, dtype=np.float64))
    x_W = x_W - x_W.mean()
    y_SW = np.log(values_SW)
    y_SW = y_SW - y_SW.mean(1, keepdims=True)
    seeds, count = y_SW.shape
    spread = seeds * float((x_W**2).sum())
    value = float((y_SW * x_W).sum()) / spread
    degrees = seeds * count - seeds - 1
    variance = float(((y_SW - value * x_W) ** 2).sum()) / degrees
    half = student_quantile(degrees, confidence) * math.sqrt(variance / spread)
    return Slope(value, value - half, value + half)
