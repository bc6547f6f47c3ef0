"""Which slopes are those of a right parametrization, by what is measured: data.

A rule that is wrong is wrong by a power of the width, 1/2 at least: a verdict has to tell 0 from 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from muonscale.lab.coordcheck.slopes import Slope
from muonscale.optim.options import OPTIONS_OF

WRONG = 0.5
"""The smallest exponent that a wrong rule has: multipliers are whole powers of the root of the width."""
REACH = WRONG / 2
"""How far the interval of a flat slope may reach: it has to be nearer to 0 than to a wrong one."""

OutcomeT = Literal["pass", "fail", "undecided"]

START, SIZE, CHANGE, WEIGHT, UPDATE = "start", "size", "change", "weight", "update"
QUANTITIES = {
    START: "size of outputs before training",
    SIZE: "size of outputs",
    CHANGE: "change of outputs",
    WEIGHT: "norm of weights",
    UPDATE: "norm of updates",
}
"""What is judged. All but the first are means of logarithms over the later steps."""

LOGITS, SCORES, VECTORS = "logits", "attention logits", "gains and biases"
PRODUCTS = (SCORES, "feed-forward", "experts", "shared experts")
"""Parts whose outputs are of products of outputs: both factors drift."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The slopes that count as right."""

    lowest: float = 0.0
    highest: float = 0.0
    """The right slope is from the one to the other."""
    tolerance: float = 0.1
    """How far from that a slope may be."""

    def judge(self, slope: Slope) -> OutcomeT:
        """Return `pass` for a slope that is right, `fail` for one that is not, else `undecided`.

        Right: it is within the tolerance, and its interval ends before `REACH`. Not right: none of its
        interval is within the tolerance, or the slope itself is beyond `REACH`.
        """
        if not slope.known:
            return "fail"
        least, most = self.lowest - self.tolerance, self.highest + self.tolerance
        floor, ceiling = self.lowest - REACH, self.highest + REACH
        if least <= slope.value <= most and floor < slope.low and slope.high < ceiling:
            return "pass"
        outside = slope.low > most or slope.high < least
        far = not floor <= slope.value <= ceiling
        return "fail" if outside or far else "undecided"

    def off(self, slope: float) -> float:
        """Return how far a slope is from what is right, in tolerances."""
        return max(self.lowest - slope, slope - self.highest, 0.0) / self.tolerance


TOLERANCES = {
    (quantity, part): tolerance
    for part, tolerance in dict.fromkeys(PRODUCTS, 0.2).items()
    for quantity in (SIZE, CHANGE)
}
"""By quantity and part, where it is not 0.1."""


def limit_of(
    quantity: str, part: str, rule: str | None, *, fall: float = 0.0, grow: str = "heads"
) -> Limit:
    """Return what a slope is held against.

    A matrix whose outputs grow more slowly than its inputs (a head, a router, a latent vector with a
    part of fixed size) sees ever fewer of their directions. Of inputs that have nothing to do with
    it, what it gives falls as the root of out/in: before training exactly so, later where a token is
    still unlike others. An update of Muon has no more directions than its matrix; one of AdamW has.

    Args:
        quantity: of `QUANTITIES`.
        part: of the model.
        rule: that updates the parameter, or the matrix whose output it is.
        fall: minus half the exponent of its out/in, 0 where that does not fall.
        grow: "heads" or "head_dim", what is more or longer in a wider model.
    """
    tolerance = TOLERANCES.get((quantity, part), 0.1)
    if part == SCORES and grow == "head_dim":  # divided by the length of a head, not by its root
        fall = WRONG
    if quantity == START:
        return Limit(lowest=-fall, highest=-fall, tolerance=tolerance)
    if quantity == UPDATE:
        # AdamW's multiplier is for entries that agree in sign, which they do not wholly.
        random = rule is not None and not OPTIONS_OF[rule].on_matrices and part != VECTORS
        return Limit(lowest=-WRONG if random else 0.0, tolerance=tolerance)
    if quantity == CHANGE and rule is not None and not OPTIONS_OF[rule].on_matrices:
        return Limit(tolerance=tolerance)
    return Limit(lowest=-fall, tolerance=tolerance)
