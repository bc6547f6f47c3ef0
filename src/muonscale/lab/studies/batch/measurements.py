"""What a batch study measured: tokens to a loss at every batch size, at the best learning rate there."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from muonscale.lab.studies.analysis.curves import Curve, read_curve
from muonscale.lab.studies.analysis.reach import reach_of
from muonscale.lab.studies.analysis.seed_blocks import Blocks
from muonscale.lab.studies.analysis.sweep import EdgeT, Point, Sweep
from muonscale.lab.studies.study import Outcomes

Key = tuple[str, int]
"""Variant and batch size."""
Rates = Mapping[float, Mapping[int, Curve | None]]
"""Curves by learning rate and seed of the runs that ended, None for one that diverged."""
StateT = Literal["reached", ">", "<", "missing"]

EASIER = (0.25, 0.5)
"""Where the easier targets lie, between the hardest one and the loss at the first evaluations."""


@dataclass(frozen=True)
class Cell:
    """Tokens to a target of one variant at one batch size."""

    variant: str
    batch: int
    state: StateT
    """`>`: not reached by all seeds at any learning rate; `<`: below it at the first evaluation of a
    run, so that the target is too easy; `missing`: no run has ended."""
    bound: float
    """Tokens of a whole run (`>`) or at its first evaluation (`<`); else NaN."""
    rates: list[dict[str, object]]
    """Learning rates: lr, and tokens by seed (None: not reached)."""
    lr: float | None
    """With the least mean log tokens over seeds, all of which reach the target."""
    edge: EdgeT | None
    """Where it is the lowest or the highest that was tried."""
    log_tokens: Mapping[int, float]
    """log T by seed, there."""


@dataclass(frozen=True)
class Spent:
    """A cell with its mean over seeds and the noise of it."""

    cell: Cell
    log_tokens: float
    """Mean of log T for an average seed; NaN where it was not reached."""
    error: float
    """Its standard error, the luck of the seed not included; NaN without noise to judge by."""


def read_cells(outcomes: Outcomes) -> dict[Key, Rates]:
    """Return the curves of all runs that ended, by variant, batch size, learning rate and seed."""
    found: dict[Key, dict[float, dict[int, Curve | None]]] = defaultdict(lambda: defaultdict(dict))
    for outcome in outcomes.values():
        where = outcome.run.coordinates
        rates = found[str(where["variant"]), int(where["batch"])][float(where["lr"])]
        if not math.isnan(outcome.loss):
            whole = math.isfinite(outcome.loss)
            rates[int(where["seed"])] = read_curve(outcome) if whole else None
    return {key: dict(rates) for key, rates in found.items()}


def choose_targets(cells: Mapping[Key, Rates]) -> list[float]:
    """Return targets that all can be asked for, the easiest first; none before any run has ended.

    The hardest is the largest final loss over variants and batch sizes, each at the learning rate with
    the lowest: all seeds reach it there. Two easier ones lie a quarter and a half of the way from it to
    the lowest loss that any run had at its first evaluation. All are rounded up to 0.01.
    """
    best = [rates[lr] for rates in cells.values() if (lr := _best_final(rates)) is not None]
    curves = [curve for seeds in best for curve in seeds.values() if curve is not None]
    if not curves:
        return []
    hardest = max(float(curve.loss[-1]) for curve in curves)
    runs = [c for rates in cells.values() for seeds in rates.values() for c in seeds.values() if c]
    first = min(float(curve.loss[0]) for curve in runs)
    easier = [hardest + part * (first - hardest) for part in EASIER if first > hardest]
    return sorted({_rounded_up(loss) for loss in [hardest, *easier]}, reverse=True)


def _best_final(rates: Rates) -> float | None:
    points = []
    for lr in sorted(rates):
        losses = {s: math.inf if c is None else float(c.loss[-1]) for s, c in rates[lr].items()}
        points.append(Point(lr, losses))
    best = Sweep(tuple(points)).best
    return None if best is None else points[best].value


def _rounded_up(loss: float) -> float:
    return math.ceil(round(loss * 100, 6)) / 100


def cell_of(key: Key, rates: Rates, target: float) -> Cell:
    """Return what it took to a target at one batch size."""
    reached = {
        lr: {seed: _reach(curve, target) for seed, curve in rates[lr].items()}
        for lr in sorted(rates)
    }
    each = [found for seeds in reached.values() for found in seeds.values()]
    sweep = Sweep(tuple(Point(lr, {s: x for s, (x, _) in r.items()}) for lr, r in reached.items()))
    rows: list[dict[str, object]] = [
        {
            "lr": lr,
            "tokens": {str(s): math.exp(x) for s, (x, _) in seeds.items() if not np.isnan(x)},
        }
        for lr, seeds in reached.items()
    ]
    early = [bound for x, bound in each if math.isnan(x)]
    if early:
        return Cell(*key, "<", min(early), rows, None, None, {})
    if sweep.best is None:
        ends = [bound for _, bound in each if not math.isnan(bound)]
        bound = max(ends, default=math.nan)
        return Cell(*key, ">" if each else "missing", bound, rows, None, None, {})
    best = sweep.points[sweep.best]
    return Cell(*key, "reached", math.nan, rows, best.value, sweep.edge, best.losses)


def _reach(curve: Curve | None, target: float) -> tuple[float, float]:
    """Return log T, infinite if not reached and NaN if reached too early to tell, and the bound then."""
    if curve is None:
        return math.inf, math.nan
    found = reach_of(curve, "tokens", target)
    if found.censored:
        return (math.inf if found.censored == ">" else math.nan), found.amount
    return math.log(found.amount), math.nan


def spent_of(cell: Cell, blocks: Blocks[Key] | None) -> Spent:
    """Return a cell with mean and error; blocks are those of all cells that reached the target."""
    key = (cell.variant, cell.batch)
    if blocks is None or key not in blocks.groups:
        return Spent(cell, math.nan, math.nan)
    place = blocks.groups.index(key)
    return Spent(cell, blocks.mean(key), blocks.sigma * math.sqrt(blocks.covariance[place, place]))
