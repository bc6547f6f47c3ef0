"""The tokens, steps, FLOPs or seconds that it took to reach a loss, read from a measured curve.

Isotonic regression of the log loss makes the curve fall. A monotone cubic through the logarithms of
amount and loss is then inverted between the two measurements around the target. A target that the
curve does not bracket gets a censored answer, never an extrapolated one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq, isotonic_regression

from muonscale.errors import StudyError
from muonscale.lab.fits.result import check_count, check_positive

LEAST_POINTS = 2
CensoredT = Literal["", "<", ">"]


@dataclass(frozen=True)
class Crossing:
    """The amount that it took to reach a target, or a bound on it."""

    amount: float
    """The amount, or the bound if `censored`."""
    censored: CensoredT
    """`>`: not reached by the end of the curve; `<`: already reached at its first point."""

    def __str__(self) -> str:
        """Return the amount, or `> end` or `< start`."""
        return f"{self.censored} {self.amount:.4g}".strip()


def find_crossing(target: float, amount: ArrayLike, loss: ArrayLike) -> Crossing:
    """Return the amount at which a curve first reached `target`.

    Args:
        target: loss to reach.
        amount: tokens, steps, FLOPs or seconds of each measurement, ascending, `[n]`.
        loss: loss of each measurement.

    Raises:
        StudyError: for fewer than two measurements, amounts that do not ascend, or values that are
            not positive and finite.
    """
    check_positive(target=[target])
    amounts, losses = check_positive(amount=amount, loss=loss)
    check_count("a crossing", "measurements", len(amounts), LEAST_POINTS)
    for place in np.flatnonzero(np.diff(amounts) <= 0)[:1]:
        raise StudyError(
            f"the amounts must ascend: measurement {place + 1} is at {amounts[place]:g}, "
            f"the next one at {amounts[place + 1]:g}"
        )
    log_amount, log_target = np.log(amounts), float(np.log(target))
    log_loss = isotonic_regression(np.log(losses), increasing=False).x
    below = np.flatnonzero(log_loss <= log_target)
    if len(below) == 0:
        return Crossing(float(np.exp(log_amount[-1])), ">")
    first = int(below[0])
    if log_loss[first] == log_target:
        return Crossing(float(np.exp(log_amount[first])), "")
    if first == 0:
        return Crossing(float(np.exp(log_amount[0])), "<")
    curve = PchipInterpolator(log_amount, log_loss)
    bracket = log_amount[first - 1], log_amount[first]
    place = brentq(lambda x: float(curve(x)) - log_target, *bracket, xtol=1e-13)
    return Crossing(float(np.exp(place)), "")
