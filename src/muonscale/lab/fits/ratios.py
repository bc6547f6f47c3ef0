"""How the laws of two groups compare: FLOPs at equal loss, or tokens at equal batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from muonscale.lab.fits.bootstrap import Draws, Quantity, join
from muonscale.lab.fits.findings import FitRatio, estimate_quantity, format_significant
from muonscale.lab.fits.laws.base import Law, LossLaw
from muonscale.lab.fits.result import ROUNDING, FloatArray, SizeRange

ROWS = 5
LawT = TypeVar("LawT", bound=Law)


@dataclass(frozen=True, kw_only=True)
class DrawnLaw(Generic[LawT]):
    """A law of one group, with its draws."""

    name: str
    law: LawT
    draws: Draws


def compare_flops(
    first: DrawnLaw[LossLaw], second: DrawnLaw[LossLaw], at: tuple[float, ...] = ()
) -> FitRatio:
    """Return the FLOPs of one law over those of another at equal loss, with intervals.

    Args:
        first: law whose FLOPs are the numerator.
        second: law whose FLOPs are the denominator.
        at: FLOPs of the second law to compare at besides five over the losses that both measured,
            or over the range of the second law if they share none.
    """
    split = len(first.draws.estimate)

    def log_ratio(theta: FloatArray, flops: float) -> FloatArray:
        loss = second.law.log_value(theta[..., split:], flops)
        return first.law.log_reach(theta[..., :split], loss) - np.log(flops)

    ends = SizeRange.of(first.law.places)
    losses = [first.law.log_value(first.draws.estimate, flops) for flops in (ends.low, ends.high)]
    shared = np.exp([second.law.log_reach(second.draws.estimate, loss) for loss in losses])
    measured = _spread(SizeRange.of(second.law.places), *shared)
    return _tabulate(
        (first, second),
        ("FLOPs at equal loss", f"FLOPs of {second.name}" if second.name else "FLOPs"),
        tuple(sorted([*at, *(p for p in measured if not np.isclose(at, p, rtol=ROUNDING).any())])),
        log_ratio,
        lambda flops, ratio: not (second.law.holds(flops) and first.law.holds(ratio * flops)),
    )


def compare_tokens(first: DrawnLaw[Law], second: DrawnLaw[Law]) -> FitRatio:
    """Return the tokens of one law over those of another at equal batch size, with intervals.

    The batch sizes are five over the range of both laws, or over that of the first if they share
    none.
    """
    split = len(first.draws.estimate)

    def log_ratio(theta: FloatArray, size: float) -> FloatArray:
        steps = first.law.log_value(theta[..., :split], size)
        return steps - second.law.log_value(theta[..., split:], size)

    other = SizeRange.of(second.law.places)
    return _tabulate(
        (first, second),
        ("tokens to the target at equal batch size", "batch size"),
        _spread(SizeRange.of(first.law.places), other.low, other.high),
        log_ratio,
        lambda size, _: not (first.law.holds(size) and second.law.holds(size)),
    )


def _spread(measured: SizeRange, low: float, high: float) -> tuple[float, ...]:
    """Return five places over the part of a range that is between two ends, else over all of it."""
    low, high = max(low, measured.low), min(high, measured.high)
    if not low < high:
        low, high = measured.low, measured.high
    return tuple(np.geomspace(low, high, ROWS).tolist())


def _tabulate(
    sides: tuple[DrawnLaw, DrawnLaw],
    labels: tuple[str, str],
    places: tuple[float, ...],
    log_ratio: Callable[[FloatArray, float], FloatArray],
    is_extrapolated: Callable[[float, float], bool],
) -> FitRatio:
    joined, rows = join(sides[0].draws, sides[1].draws), []
    for place in places:
        quantity: Quantity = lambda theta, place=place: log_ratio(theta, place)  # noqa: E731
        outside = is_extrapolated(place, float(np.exp(quantity(joined.estimate))))
        rows.append(
            estimate_quantity(format_significant(place), joined, quantity, outside, log=True)
        )
    return FitRatio(
        first=sides[0].name,
        second=sides[1].name,
        what=labels[0],
        at=labels[1],
        places=tuple(places),
        rows=tuple(rows),
        undetermined=tuple(side.name for side in sides if not side.law.is_determined),
    )
