"""How well a law says the losses of a rung that it has not seen: each rung left out in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from muonscale.errors import StudyError
from muonscale.lab.fits.checks import distinct, enough, positive
from muonscale.lab.fits.result import BoolArray, FloatArray

LEAST_RUNGS = 3
Refit = Callable[[BoolArray], FloatArray]
"""From which points to keep, `[n]`, to what the law fitted to these says of every point, `[n]`."""


@dataclass(frozen=True)
class HeldOut:
    """A rung, and how far a law fitted to the others is from it."""

    rung: float
    points: int
    error: float | None
    """Root mean square of log(predicted / measured) over its points; None if `refused`."""
    extrapolated: bool
    """It is the lowest or highest rung."""
    refused: str = ""
    """Why the other rungs give no law."""


def leave_rungs_out(rung: ArrayLike, loss: ArrayLike, refit: Refit) -> tuple[HeldOut, ...]:
    """Fit without each rung in turn, and compare what the law says with what it measured.

    Args:
        rung: size of each run, by which runs belong together, `[n]`.
        loss: what each run measured.
        refit: fits to some of the points and predicts all.

    Returns:
        One entry per rung, ascending. The last one is the error of extrapolating by one rung.

    Raises:
        StudyError: for fewer than three rungs.
    """
    rungs, losses = positive(rung=rung, loss=loss)
    enough("leaving rungs out", "rungs", distinct(rungs), LEAST_RUNGS)
    labels = np.unique(np.round(np.log(rungs), 9))
    place = np.searchsorted(labels, np.round(np.log(rungs), 9))
    return tuple(
        _held_out(place == label, label in (0, len(labels) - 1), rungs, losses, refit)
        for label in range(len(labels))
    )


def _held_out(
    out: BoolArray, extrapolated: bool, rungs: FloatArray, losses: FloatArray, refit: Refit
) -> HeldOut:
    rung, points = float(rungs[out][0]), int(out.sum())
    try:
        predicted = refit(~out)
    except StudyError as error:
        return HeldOut(rung, points, None, extrapolated, str(error))
    misses = np.log(predicted[out] / losses[out])
    return HeldOut(rung, points, float(np.sqrt(np.mean(misses**2))), extrapolated)
