"""The error of a law on sizes that it has not seen: each rung is left out in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from muonscale.errors import StudyError
from muonscale.lab.fits.result import ROUNDING, BoolArray, FloatArray, check_count, check_positive

LEAST_RUNGS = 3
RUNG_WIDTH = 0.03
"""Sizes that differ by less are one rung: in real tables some differ in the fourth digit."""
Refit = Callable[[BoolArray], FloatArray]
"""Fits the law to the points to keep, `[n]`, and returns its predictions for all points, `[n]`."""


@dataclass(frozen=True)
class LeftOut:
    """A rung, and the error on it of a law fitted to the other rungs."""

    rung: float
    """Median of its sizes."""
    points: int
    error: float | None
    """Root mean square of log(predicted / measured) over its points. None if `refused`."""
    extrapolated: bool
    """Whether it is the lowest or the highest rung."""
    refused: str = ""
    """Why the law cannot be fitted to the other rungs."""


def leave_rungs_out(
    rung: ArrayLike, loss: ArrayLike, refit: Refit, width: float = RUNG_WIDTH
) -> tuple[LeftOut, ...]:
    """Fit without each rung in turn, and compare the predictions with the measurements.

    Args:
        rung: size of each run, `[n]`.
        loss: what each run measured.
        refit: fits to some of the points and predicts all.
        width: runs whose sizes are within this part of the smallest of them are one rung.

    Returns:
        One entry per rung, ascending. The last one is the error of extrapolating by one rung.

    Raises:
        StudyError: for fewer than three rungs.
    """
    rungs, losses = check_positive(rung=rung, loss=loss)
    starts: list[float] = []
    for size in np.sort(rungs):
        if not starts or np.log(size / starts[-1]) > np.log1p(width) + ROUNDING:
            starts.append(size)
    check_count("leaving rungs out", "rungs", len(starts), LEAST_RUNGS)
    place = np.searchsorted(starts, rungs, side="right") - 1
    found = []
    for label in range(len(starts)):
        out, extrapolated = place == label, label in (0, len(starts) - 1)
        size, points = float(np.median(rungs[out])), int(out.sum())
        try:
            predicted = refit(~out)
        except StudyError as error:
            found.append(LeftOut(size, points, None, extrapolated, str(error)))
            continue
        misses = np.log(predicted[out] / losses[out])
        found.append(LeftOut(size, points, float(np.sqrt(np.mean(misses**2))), extrapolated))
    return tuple(found)
