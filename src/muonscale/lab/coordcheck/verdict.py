"""Judges the slopes of everything that was measured at several widths."""

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
"""The first step that can be judged. Earlier ones still show the random initial weights."""
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
"""Parts of a model in the order of a forward pass."""
BADNESS: dict[OutcomeT, int] = {"fail": 2, "undecided": 1, "pass": 0}


@dataclass(frozen=True, kw_only=True)
class JudgedSlope:
    """A slope and its outcome."""

    part: str
    quantity: str
    name: str
    """The name of the module or parameter, with a star for every number."""
    slope: Slope
    limit: Limit
    outcome: OutcomeT


def judged_steps(steps: int) -> range:
    """Return the steps that are judged: the second half, none before `EARLIEST`."""
    return range(max(EARLIEST, -(-steps // 2)), steps + 1)


def judge(
    widths: Sequence[int],
    values: Mapping[tuple[str, str, str], np.ndarray],
    rules: Mapping[str, str],
    falls: Mapping[str, float],
    grow: str = "heads",
) -> list[JudgedSlope]:
    """Return the slopes of a check with their outcomes, by part in the order of `PARTS`.

    Args:
        widths: W widths.
        values: `[seeds, W, steps + 1]` by (quantity, part, name).
        rules: "muon" or "adamw" by the name of a parameter, or of its module.
        falls: by the same names, minus half the exponent of out/in of the matrix, where that falls.
        grow: as for `limit_of`.
    """
    rows = []
    for (quantity, part, name), values_SWT in values.items():
        late = values_SWT[:, :, list(judged_steps(values_SWT.shape[2] - 1))]
        with np.errstate(divide="ignore", invalid="ignore"):
            means_SW = np.exp(np.log(late).mean(-1))  # geometric; 0 and non-finite values remain
        judged = {quantity: means_SW}
        if quantity == SIZE:
            judged[START] = values_SWT[:, :, 0]
        owner = name.partition("[")[0]
        for what, values_SW in judged.items():
            limit = limit_of(what, part, rules.get(owner), fall=falls.get(owner, 0.0), grow=grow)
            slope = fit_slope(widths, values_SW)
            outcome = limit.judge(slope)
            rows.append(
                JudgedSlope(
                    part=part, quantity=what, name=name, slope=slope, limit=limit, outcome=outcome
                )
            )

    def order(row: JudgedSlope) -> tuple[int, int, str]:
        place = PARTS.index(row.part) if row.part in PARTS else len(PARTS)
        return place, (START, SIZE, CHANGE, WEIGHT, UPDATE).index(row.quantity), row.name

    return sorted(rows, key=order)


def worst_of(rows: Sequence[JudgedSlope]) -> JudgedSlope:
    """Return the slope that decides: the worst outcome, then the farthest from its limit."""

    def badness(row: JudgedSlope) -> tuple[int, float]:
        off = row.limit.off(row.slope.value) if row.slope.known else math.inf
        return BADNESS[row.outcome], off

    return max(rows, key=badness)


def passed(rows: Sequence[JudgedSlope]) -> bool:
    """Return whether all slopes pass; an undecided one does not."""
    return all(row.outcome == "pass" for row in rows)
