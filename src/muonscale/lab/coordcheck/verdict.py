"""From what was measured at several widths to a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from muonscale.lab.coordcheck.slopes import Slope, fit_slope
from muonscale.lab.coordcheck.tolerances import (
    CHANGE,
    SIZE,
    START,
    UPDATE,
    WEIGHT,
    Limit,
    OutcomeT,
    limit_of,
)

EARLIEST = 2
"""No later figure is of a step before this: in the first ones random weights still show."""
PARTS = (
    "embedding",
    "attention",
    "attention logits",
    "feed-forward",
    "router",
    "experts",
    "shared experts",
    "residual stream",
    "gains and biases",
    "head",
    "logits",
)
"""In the order of a forward pass."""
WORST: dict[OutcomeT, int] = {"fail": 2, "undecided": 1, "pass": 0}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One slope that was judged."""

    part: str
    quantity: str
    name: str
    """Of the module or parameter, with a star for every number."""
    slope: Slope
    limit: Limit
    outcome: OutcomeT

    @property
    def badness(self) -> tuple[int, float]:
        """What rows are compared by: outcome, then how far the slope is from what is right."""
        off = self.limit.off(self.slope.value) if self.slope.known else math.inf
        return WORST[self.outcome], off


def judged_steps(steps: int) -> range:
    """Return the later steps of a check of so many: the second half, none before `EARLIEST`."""
    return range(max(EARLIEST, -(-steps // 2)), steps + 1)


def judge(
    widths: Sequence[int],
    values: Mapping[tuple[str, str, str], np.ndarray],
    rules: Mapping[str, str],
    falls: Mapping[str, float],
    grow: str = "heads",
) -> list[Row]:
    """Return the slopes of a check and what comes of them, by part in the order of `PARTS`.

    Args:
        widths: W of them.
        values: by (quantity, part, name), `[seeds, W, steps + 1]`.
        rules: "muon" or "adamw" by name of a parameter, or of the module that has it.
        falls: likewise, minus half the exponent of out/in of its matrix, where that falls.
        grow: as for `limit_of`.
    """
    rows = []
    for (quantity, part, name), values_SWT in values.items():
        later = [(quantity, _later(values_SWT))]
        if quantity == SIZE:
            later.append((START, values_SWT[:, :, 0]))
        for what, values_SW in later:
            owner = name.partition("[")[0]
            fall = falls.get(owner, 0.0)
            limit = limit_of(what, part, rules.get(owner), fall=fall, grow=grow)
            slope = fit_slope(widths, values_SW)
            outcome = limit.judge(slope)
            row = Row(
                part=part, quantity=what, name=name, slope=slope, limit=limit, outcome=outcome
            )
            rows.append(row)
    return sorted(rows, key=_order)


def _later(values_SWT: np.ndarray) -> np.ndarray:
    """Return geometric means over the later steps; 0 and what is not finite stay so."""
    late = values_SWT[:, :, list(judged_steps(values_SWT.shape[2] - 1))]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(np.log(late).mean(-1))


def _order(row: Row) -> tuple[int, int, str]:
    quantities = (START, SIZE, CHANGE, WEIGHT, UPDATE)
    place = PARTS.index(row.part) if row.part in PARTS else len(PARTS)
    return place, quantities.index(row.quantity), row.name


def worst_of(rows: Sequence[Row]) -> Row:
    """Return the row that decides."""
    return max(rows, key=lambda row: row.badness)


def passed(rows: Sequence[Row]) -> bool:
    """Return whether all slopes are right: one that is undecided is not."""
    return all(row.outcome == "pass" for row in rows)
