"""Noise between seeds, intervals of known errors, and p-values of several tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from muonscale.lab.fits.bootstrap import CONFIDENCE
from muonscale.lab.fits.result import FloatArray, check_positive


def estimate_seed_noise(settings: Sequence[ArrayLike], loss: ArrayLike) -> float | None:
    """Return the standard deviation of the log loss over seeds, or None if no setting is repeated.

    It is pooled over the settings: squares about their means, over runs less settings.

    Args:
        settings: columns that are equal in runs that differ in their seed alone, such as N and D,
            `[n]` each.
        loss: loss of each run, `[n]`.

    Raises:
        StudyError: for values that are not positive and finite, or columns of other lengths.
    """
    columns = check_positive(
        **{f"setting {i + 1}": column for i, column in enumerate(settings)}, loss=loss
    )
    keys = np.round(np.log(np.stack(columns[:-1], axis=1)), 9)
    _, place = np.unique(keys, axis=0, return_inverse=True)
    return pool_noise(place.ravel(), np.log(columns[-1]))


def pool_noise(place: np.ndarray, values: FloatArray) -> float | None:
    """Return the pooled standard deviation of values about the means of their groups."""
    counts = np.bincount(place)
    degrees = len(values) - len(counts)
    if degrees == 0:
        return None
    means = np.bincount(place, weights=values) / counts
    return float(np.sqrt(np.sum((values - means[place]) ** 2) / degrees))


def student_quantile(freedom: int, level: float = CONFIDENCE) -> float:
    """Return how many standard errors half a two-sided interval is; NaN without freedom."""
    return float(student.ppf((1 + level) / 2, freedom)) if freedom > 0 else float("nan")


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979). NaN stays NaN."""
    adjusted = [float("nan")] * len(p_values)
    order = sorted((p, n) for n, p in enumerate(p_values) if not np.isnan(p))
    largest = 0.0
    for rank, (p, number) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[number] = largest
    return adjusted
