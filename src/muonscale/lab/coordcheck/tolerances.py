"""The slopes that a right parametrization has, by quantity and part of the model.

A wrong rule is wrong by a power of the width of at least 1/2, so a verdict has to distinguish 0
from 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from muonscale.lab.coordcheck.slopes import Slope
from muonscale.optim.options import OPTIONS_OF

WRONG = 0.5
"""The smallest exponent of a wrong rule, as multipliers are powers of the root of the width."""
REACH = WRONG / 2
"""The interval of a flat slope must end before this, nearer to 0 than to a wrong exponent."""

OutcomeT = Literal["pass", "fail", "undecided"]

START, SIZE, CHANGE, WEIGHT, UPDATE = "start", "size", "change", "weight", "update"
QUANTITIES = {
    START: "size of outputs before training",
    SIZE: "size of outputs",
    CHANGE: "change of outputs",
    WEIGHT: "norm of weights",
    UPDATE: "norm of updates",
}
"""Quantities that are judged. All but the first are means of logarithms over the later steps."""

LOGITS, SCORES, VECTORS = "logits", "attention logits", "gains and biases"
PRODUCTS = (SCORES, "feed-forward", "experts", "shared experts")
"""Parts whose outputs are products of outputs, so that both factors drift."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The slopes that pass: from `lowest` to `highest`, give or take the tolerance."""

    lowest: float = 0.0
    highest: float = 0.0
    tolerance: float = 0.1

    def judge(self, slope: Slope) -> OutcomeT:
        """Return the outcome for a slope.

        It passes if it is within the tolerance and its interval ends before `REACH`. It fails if
        none of its interval is within the tolerance, or the slope itself is beyond `REACH`.
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
        """Return the distance of a slope from the right ones, in tolerances."""
        return max(self.lowest - slope, slope - self.highest, 0.0) / self.tolerance


TOLERANCES = {
    (quantity, part): tolerance
    for part, tolerance in dict.fromkeys(PRODUCTS, 0.2).items()
    for quantity in (SIZE, CHANGE)
}
"""Tolerances by quantity and part, where they are not 0.1."""


def limit_of(
    quantity: str, part: str, rule: str | None, *, fall: float = 0.0, grow: str = "heads"
) -> Limit:
    """Return the limit for a slope.

    A matrix whose outputs grow more slowly than its inputs (a head, a router, a latent vector with
    a part of fixed size) sees ever fewer of their directions. For inputs that are independent of
    the matrix, its outputs fall as the root of out/in: exactly before training, and later as long
    as a token is unlike others. An update of Muon has no more directions than its matrix; one of
    AdamW has.

    Args:
        quantity: a key of `QUANTITIES`.
        part: the part of the model.
        rule: the rule that updates the parameter, or the matrix whose output is measured.
        fall: minus half the exponent of the matrix's out/in; 0 if that does not fall.
        grow: "heads" or "head_dim": whether a wider model has more or longer heads.
    """
    tolerance = TOLERANCES.get((quantity, part), 0.1)
    if (
        part == SCORES and grow == "head_dim"
    ):  # scores are divided by the length of a head, not its root
        fall = WRONG
    if quantity == START:
        return Limit(lowest=-fall, highest=-fall, tolerance=tolerance)
    if quantity == UPDATE:
        # AdamW's multiplier assumes entries that agree in sign, which they do only in part.
        random = rule is not None and not OPTIONS_OF[rule].on_matrices and part != VECTORS
        return Limit(lowest=-WRONG if random else 0.0, tolerance=tolerance)
    if quantity == CHANGE and rule is not None and not OPTIONS_OF[rule].on_matrices:
        return Limit(tolerance=tolerance)
    return Limit(lowest=-fall, tolerance=tolerance)
