"""Tokens to a loss at every batch size, at the best learning rate there."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from muonscale.lab.studies.analysis.curves import LossCurve, read_curve
from muonscale.lab.studies.analysis.reach import reach_on_curve
from muonscale.lab.studies.analysis.sweep import EdgeT, Point, Sweep
from muonscale.lab.studies.study import Outcomes

Key = tuple[str, int]
"""Variant and batch size."""
Rates = Mapping[float, Mapping[int, LossCurve | None]]
"""Curves by learning rate and seed of the runs that ended, None for one that diverged."""
StateT = Literal["reached", ">", "<", "missing"]

EASIER = (0.25, 0.5)
"""Positions of the easier targets between the hardest one and the loss at the first evaluations."""


@dataclass(frozen=True)
class Cell:
    """Tokens to a target of one variant at one batch size."""

    variant: str
    batch: int
    state: StateT
    """`>`: at no learning rate all seeds reached it; `<`: a run was below it at its first
    evaluation, so the target is too easy; `missing`: no run has ended."""
    bound: float
    """Tokens of a whole run (`>`) or at its first evaluation (`<`), else NaN."""
    rates: list[dict[str, Any]]
    """Learning rates: lr, and tokens by seed (None: not reached)."""
    lr: float | None
    """The learning rate with the least mean log tokens, among those at which all seeds reached
    it."""
    edge: EdgeT | None
    """Whether it is the lowest or the highest that was tried."""
    log_tokens: Mapping[int, float]
    """log T by seed at that learning rate."""


def read_cells(outcomes: Outcomes) -> dict[Key, Rates]:
    """Return the curves of all runs that ended, by variant, batch size, learning rate and seed."""
    found: dict[Key, dict[float, dict[int, LossCurve | None]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for outcome in outcomes.values():
        where = outcome.run.coordinates
        rates = found[str(where["variant"]), int(where["batch"])][float(where["lr"])]
        if not math.isnan(outcome.loss):
            finite = math.isfinite(outcome.loss)
            rates[int(where["seed"])] = read_curve(outcome) if finite else None
    return {key: dict(rates) for key, rates in found.items()}


def choose_targets(cells: Mapping[Key, Rates]) -> list[float]:
    """Return targets that all can reach, the easiest first; none before any run has ended.

    The hardest is the largest final loss over variants and batch sizes, each at the learning rate
    with the lowest: all seeds reach it there. Two easier ones are a quarter and a half of the way
    from it to the lowest loss that any run had at its first evaluation. All are rounded up to 0.01.
    """
    best: list[LossCurve] = []
    for rates in cells.values():
        sweep = Sweep(
            tuple(
                Point(
                    lr,
                    {s: float(c.loss[-1]) if c else math.inf for s, c in rates[lr].items()},
                )
                for lr in sorted(rates)
            )
        )
        if sweep.best is not None:
            best += [c for c in rates[sweep.points[sweep.best].value].values() if c]
    if not best:
        return []
    hardest = max(float(curve.loss[-1]) for curve in best)
    runs = [c for rates in cells.values() for seeds in rates.values() for c in seeds.values() if c]
    first = min(float(curve.loss[0]) for curve in runs)
    easier = [hardest + part * (first - hardest) for part in EASIER if first > hardest]
    rounded = {math.ceil(round(loss * 100, 6)) / 100 for loss in [hardest, *easier]}
    return sorted(rounded, reverse=True)


def measure_cell(key: Key, rates: Rates, target: float) -> Cell:
    """Return the tokens to a target at one batch size."""
    reached = {
        lr: {seed: _reach(curve, target) for seed, curve in rates[lr].items()}
        for lr in sorted(rates)
    }
    each = [found for seeds in reached.values() for found in seeds.values()]
    sweep = Sweep(tuple(Point(lr, {s: x for s, (x, _) in r.items()}) for lr, r in reached.items()))
    rows = [
        {
            "lr": lr,
            "tokens": {str(s): math.exp(x) for s, (x, _) in seeds.items() if not np.isnan(x)},
        }
        for lr, seeds in reached.items()
    ]
    if early := [bound for x, bound in each if math.isnan(x)]:
        return Cell(*key, "<", min(early), rows, None, None, {})
    if sweep.best is None:
        ends = [bound for _, bound in each if not math.isnan(bound)]
        bound = max(ends, default=math.nan)
        return Cell(*key, ">" if each else "missing", bound, rows, None, None, {})
    best = sweep.points[sweep.best]
    return Cell(*key, "reached", math.nan, rows, best.value, sweep.edge, best.losses)


def _reach(curve: LossCurve | None, target: float) -> tuple[float, float]:
    """Return log T (infinite if not reached, NaN if reached too early to measure) and the bound."""
    if curve is None:
        return math.inf, math.nan
    found = reach_on_curve(curve, "tokens", target)
    if found.censored:
        return (math.inf if found.censored == ">" else math.nan), found.amount
    return math.log(found.amount), math.nan
