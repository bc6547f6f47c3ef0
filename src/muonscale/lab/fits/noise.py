"""How much a loss varies between runs that differ in nothing but their seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from muonscale.lab.fits.checks import positive
from muonscale.lab.fits.result import FloatArray


def seed_noise(settings: Sequence[ArrayLike], loss: ArrayLike) -> float | None:
    """Return the standard deviation of the log loss over seeds, or None if no setting was repeated.

    It is pooled over the settings: squares about their means, over runs less settings.

    Args:
        settings: what two runs must have equal to be repeats, such as N and D, `[n]` each.
        loss: loss of each run, `[n]`.

    Raises:
        StudyError: for values that are not positive and finite, or columns of other lengths.
    """
    columns = positive(
        **{f"setting {i + 1}": column for i, column in enumerate(settings)}, loss=loss
    )
    log_loss = np.log(columns[-1])
    keys = np.round(np.log(np.stack(columns[:-1], axis=1)), 9)
    _, place = np.unique(keys, axis=0, return_inverse=True)
    return pooled(place.ravel(), log_loss)


def pooled(place: np.ndarray, values: FloatArray) -> float | None:
    """Return the pooled standard deviation of values about the means of their groups."""
    counts = np.bincount(place)
    degrees = len(values) - len(counts)
    if degrees == 0:
        return None
    means = np.bincount(place, weights=values) / counts
    return float(np.sqrt(np.sum((values - means[place]) ** 2) / degrees))
