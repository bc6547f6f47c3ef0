"""The best value of a hyper-parameter at every width, and whether it stays the same."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from muonscale.errors import StudyError
from muonscale.lab.fits.laws.quadratic import minimum_interval
from muonscale.lab.studies.analysis.seed_blocks import fit_blocks
from muonscale.lab.studies.analysis.sweep import EdgeT, Sweep


@dataclass(frozen=True)
class WidthAnalysis:
    """One width."""

    width: int
    points: list[dict[str, Any]]
    """Values of the hyper-parameter: value, losses by seed (None: diverged), their mean."""
    best: float | None
    """The measured value with the lowest mean loss."""
    loss: float
    """The mean loss at that value."""
    edge: EdgeT | None
    optimum: float
    """Minimum of a parabola through the best value and its neighbors; the best value if there is
    none."""
    low: float
    high: float
    """Ends of its 90 % interval, NaN without a parabola or without noise to judge by."""


@dataclass(frozen=True)
class TransferAnalysis:
    """One optimizer under one convention."""

    variant: str
    convention: str
    widths: list[WidthAnalysis]
    step: float
    """Ratio of one value of the grid to the one before; NaN before any run."""
    noise: float
    """Noise of one loss, without seed effects; NaN with one seed."""
    moved: float
    """Largest distance of an optimum from that at the first width, in steps of the grid."""
    transfers: bool | None
    """Whether it moved less than one step and was at no edge; None if runs are missing."""
    why: str


def analyze_curve(
    variant: str, convention: str, sweeps: Mapping[int, Sweep], name: str, *, tuned: bool = True
) -> TransferAnalysis:
    """Return whether the optimum of one optimizer under one convention stays where it is.

    Args:
        variant: the optimizer.
        convention: how hyper-parameters change with the width.
        sweeps: losses over the hyper-parameter by width.
        name: name of the hyper-parameter, for messages.
        tuned: whether the other hyper-parameters are tuned at the first width.
    """
    noise = _pool_noise(sweeps)
    widths = [_analyze_width(width, sweep, noise, name) for width, sweep in sweeps.items()]
    step = moved = math.nan
    if sweeps:
        values = [point.value for point in next(iter(sweeps.values())).points]
        step = statistics.median(b / a for a, b in itertools.pairwise(values))
    places = [w.optimum for w in widths]
    if places and not any(map(math.isnan, places)):
        moved = max(abs(math.log(place / places[0])) for place in places) / math.log(step)
    missing = any(not point.losses for sweep in sweeps.values() for point in sweep.points)
    lost = [w.width for w in widths if w.best is None]
    edges = [f"{w.width} ({w.edge})" for w in widths if w.edge]
    why = f"the optimum moves {moved:.2f} grid steps"
    transfers: bool | None = moved < 1
    if missing or len(widths) < 2:
        transfers, why = None, "runs are missing"
    elif not tuned:
        transfers, why = None, f"not tuned at width {widths[0].width}; {why}"
    elif lost:
        transfers, why = False, f"every run diverged at width {lost[0]}"
    elif edges:
        transfers = False
        why = f"the optimum is at the edge at width {', '.join(edges)}; {why}"
    return TransferAnalysis(variant, convention, widths, step, noise, moved, transfers, why)


def _pool_noise(sweeps: Mapping[int, Sweep]) -> float:
    """Return the noise of a loss around the optima, pooled over widths."""
    squares, freedom = 0.0, 0
    for sweep in sweeps.values():
        if len(around := sweep.around) > 1:
            blocks = fit_blocks({point.value: dict(point.losses) for point in around})
            if blocks.freedom:
                squares += blocks.freedom * blocks.sigma**2
                freedom += blocks.freedom
    return math.sqrt(squares / freedom) if freedom else math.nan


def _analyze_width(width: int, sweep: Sweep, noise: float, name: str) -> WidthAnalysis:
    points = [point.row("value") for point in sweep.points]
    nan = math.nan
    if sweep.best is None:
        return WidthAnalysis(width, points, None, nan, None, nan, nan, nan)
    best = sweep.points[sweep.best]
    pairs = [(p.value, loss) for p in sweep.points for loss in p.losses.values()]
    values, losses = zip(*pairs, strict=True)
    optimum, low, high = best.value, nan, nan
    try:
        found = minimum_interval(values, losses, 0.0 if math.isnan(noise) else noise, name=name)
        optimum = found.value
        if not math.isnan(noise):
            low, high = found.low, found.high
    except StudyError:
        pass  # at an edge, or beside a run that diverged, there is no parabola
    return WidthAnalysis(width, points, best.value, best.mean, sweep.edge, optimum, low, high)
