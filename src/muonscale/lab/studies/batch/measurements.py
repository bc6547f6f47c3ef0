"""Tokens to a loss at every batch size, at the best setting there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from muonscale.lab.studies.analysis.curves import LossCurve, read_curve
from muonscale.lab.studies.analysis.reach import reach_on_curve
from muonscale.lab.studies.study import Outcome

Key = tuple[str, int]
"""Variant and batch size."""
Curves = Mapping[int, LossCurve | None]
"""Curves by seed of the runs that ended, None for one that diverged."""
StateT = Literal["reached", ">", "<", "missing"]

EASIER = (0.25, 0.5)
"""Positions of the easier targets between the hardest one and the loss at the first evaluations."""


@dataclass(frozen=True)
class Cell:
    """Tokens to a target of one variant at one batch size."""

    variant: str
    batch: int
    state: StateT
    """`>`: not all seeds reached it; `<`: a run was below it at its first evaluation, so the target
    is too easy; `missing`: no run has ended."""
    bound: float
    """Tokens of a whole run (`>`) or at its first evaluation (`<`), else NaN."""
    log_tokens: Mapping[int, float]
    """log T by seed, if all reached it."""


def read_curves(outcomes: Iterable[Outcome]) -> Curves:
    """Return the curves of the runs that ended."""
    return {
        int(o.run.coordinates["seed"]): read_curve(o) if math.isfinite(o.loss) else None
        for o in outcomes
        if not math.isnan(o.loss)
    }


def choose_targets(cells: Mapping[Key, Curves]) -> list[float]:
    """Return targets that all can reach, the easiest first; none before any run has ended.

    The hardest is the largest final loss over variants and batch sizes: all seeds reach it. Two
    easier ones are a quarter and a half of the way from it to the lowest loss that any run had at
    its first evaluation. All are rounded up to 0.01.
    """
    runs = [curve for curves in cells.values() for curve in curves.values() if curve]
    if not runs:
        return []
    hardest = max(float(curve.loss[-1]) for curve in runs)
    first = min(float(curve.loss[0]) for curve in runs)
    easier = [hardest + part * (first - hardest) for part in EASIER if first > hardest]
    rounded = {math.ceil(round(loss * 100, 6)) / 100 for loss in [hardest, *easier]}
    return sorted(rounded, reverse=True)


def measure_cell(key: Key, curves: Curves, target: float) -> Cell:
    """Return the tokens to a target at one batch size."""
    reached = {seed: _reach(curve, target) for seed, curve in curves.items()}
    if early := [bound for x, bound in reached.values() if math.isnan(x)]:
        return Cell(*key, "<", min(early), {})
    if not reached or any(math.isinf(x) for x, _ in reached.values()):
        ends = [bound for _, bound in reached.values() if not math.isnan(bound)]
        return Cell(*key, ">" if reached else "missing", max(ends, default=math.nan), {})
    return Cell(*key, "reached", math.nan, {seed: x for seed, (x, _) in reached.items()})


def _reach(curve: LossCurve | None, target: float) -> tuple[float, float]:
    """Return log T (infinite if not reached, NaN if reached too early to measure) and the bound."""
    if curve is None:
        return math.inf, math.nan
    found = reach_on_curve(curve, "tokens", target)
    if found.censored:
        return (math.inf if found.censored == ">" else math.nan), found.amount
    return math.log(found.amount), math.nan
