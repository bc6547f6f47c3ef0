"""FLOPs of one group over those of another at equal loss, by their laws, with a joint interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from muonscale.lab.fits.bootstrap import Draws, join
from muonscale.lab.fits.findings import Ratio, estimate, number
from muonscale.lab.fits.result import FloatArray, Span

ROWS = 5


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """A law of loss by FLOPs, with its draws."""

    draws: Draws
    flops: Span
    log_loss: Callable[[FloatArray, float], FloatArray]
    """Log loss at FLOPs, of parameters `[..., p]`."""
    log_reach: Callable[[FloatArray, FloatArray], FloatArray]
    """Log FLOPs at a log loss."""
    measured: Callable[[float], bool] | None = None
    """Whether what the law says of so many FLOPs was measured, besides that `flops` holds them: a law of
    N and D may want a model that is far from those that were trained."""

    def holds(self, flops: float) -> bool:
        """Return whether the law is not extrapolated at so many FLOPs."""
        return self.flops.holds(flops) and (self.measured is None or self.measured(flops))


def flops_ratio(
    first: str,
    of: Frontier,
    second: str,
    to: Frontier,
    at: tuple[float, ...] = (),
) -> Ratio:
    """Return the FLOPs of one law over those of another at equal loss, with intervals.

    Args:
        first: name of the law whose FLOPs are the numerator.
        of: that law.
        second: name of the other law.
        to: the other law.
        at: FLOPs of the second law to compare at; five over the losses that both measured when
            there are none.
    """
    joined, split_at = join(of.draws, to.draws), len(of.draws.estimate)

    def log_ratio(flops: float) -> Callable[[FloatArray], FloatArray]:
        def quantity(theta: FloatArray) -> FloatArray:
            loss = to.log_loss(theta[..., split_at:], flops)
            return of.log_reach(theta[..., :split_at], loss) - np.log(flops)

        return quantity

    places, rows = at or _shared(of, to), []
    for flops in places:
        reached = float(np.exp(log_ratio(flops)(joined.estimate))) * flops
        outside = not (to.holds(flops) and of.holds(reached))
        rows.append(estimate(number(flops), joined, log_ratio(flops), outside, log=True))
    return Ratio(
        first=first,
        second=second,
        what="FLOPs at equal loss",
        at=f"FLOPs of {second}" if second else "FLOPs",
        places=tuple(places),
        rows=tuple(rows),
    )


def _shared(of: Frontier, to: Frontier) -> tuple[float, ...]:
    """Return FLOPs of the second law over the losses that both measured, else over its own range."""
    theirs = [of.log_loss(of.draws.estimate, end) for end in (of.flops.low, of.flops.high)]
    ends = np.exp([float(to.log_reach(to.draws.estimate, loss)) for loss in theirs])
    low, high = max(ends[0], to.flops.low), min(ends[1], to.flops.high)
    if not low < high:
        low, high = to.flops.low, to.flops.high
    return tuple(np.geomspace(low, high, ROWS).tolist())
