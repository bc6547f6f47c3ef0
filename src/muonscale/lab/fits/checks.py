"""What a fit asks of its points, and the sentences with which it refuses them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from muonscale.errors import StudyError
from muonscale.lab.fits.result import FloatArray


def positive(**columns: ArrayLike) -> tuple[FloatArray, ...]:
    """Return the columns as float64 vectors.

    Raises:
        StudyError: if they differ in length, or a value is not positive and finite.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    lengths = {name: array.shape for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or any(array.ndim != 1 for array in arrays.values()):
        shapes = ", ".join(f"{name} {shape}" for name, shape in lengths.items())
        raise StudyError(f"columns of one length are needed, got shapes: {shapes}")
    for name, array in arrays.items():
        for place in np.flatnonzero(~(np.isfinite(array) & (array > 0)))[:1]:
            raise StudyError(
                f"{name} of point {place + 1} is {array[place]:g}; every {name} must be a positive "
                "finite number"
            )
    return tuple(arrays.values())


def enough(law: str, what: str, found: int, least: int) -> None:
    """Refuse fewer than `least` of something.

    Raises:
        StudyError: naming the law, what is too few, how many there are and how many it takes.
    """
    if found < least:
        raise StudyError(f"{law} needs at least {least} {what}, got {found}")


def distinct(values: FloatArray) -> int:
    """Return how many values there are, those apart by rounding counted once."""
    ordered = np.sort(np.log(values))
    return int(1 + np.count_nonzero(np.diff(ordered) > 1e-9)) if len(ordered) else 0


def not_collinear(first: FloatArray, second: FloatArray, names: tuple[str, str]) -> None:
    """Refuse two sizes that go together, since then nothing tells their effects apart.

    Raises:
        StudyError: if the logarithms correlate by more than 0.999 in absolute value.
    """
    correlation = float(np.corrcoef(np.log(first), np.log(second))[0, 1])
    if abs(correlation) > MOST_CORRELATED:
        raise StudyError(
            f"{names[0]} and {names[1]} go together (their logarithms correlate by "
            f"{correlation:.4f}): their effects cannot be told apart; vary one with the other held"
        )


MOST_CORRELATED = 0.999
