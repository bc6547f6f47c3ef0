"""Where a hyper-parameter is best at every width, and whether that is the same place."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from muonscale.errors import StudyError
from muonscale.lab.fits.laws.quadratic import minimum_interval
from muonscale.lab.studies.analysis.seed_blocks import fit_blocks
from muonscale.lab.studies.analysis.sweep import EdgeT, Sweep


@dataclass(frozen=True)
class Curve:
    """What was measured of one optimizer under one convention."""

    variant: str
    convention: str
    sweeps: Mapping[int, Sweep]
    """Losses over the hyper-parameter, by width."""


@dataclass(frozen=True)
class Width:
    """One width."""

    width: int
    points: list[dict[str, object]]
    """Values of the hyper-parameter: value, losses by seed (None: diverged), their mean."""
    best: float | None
    """The measured value with the lowest mean loss."""
    loss: float
    """There."""
    edge: EdgeT | None
    optimum: float
    """Lowest point of a parabola through the best value and its neighbours; the best value itself
    where there is none."""
    low: float
    high: float
    """Ends of its 90 % interval, NaN where there is no parabola or no noise to judge by."""


@dataclass(frozen=True)
class Found:
    """What was found of one optimizer under one convention."""

    variant: str
    convention: str
    widths: list[Width]
    step: float
    """From one value to the next, times."""
    noise: float
    """Of one loss, seed effects taken out; NaN with one seed."""
    moved: float
    """Largest distance of an optimum from that at the first width, in steps of the grid."""
    transfers: bool | None
    """Whether it moved less than one step and was at no edge; None where runs are missing."""
    why: str


def found_of(curve: Curve, name: str) -> Found:
    """Return what was found of a curve.

    Args:
        curve: what was measured.
        name: of the hyper-parameter, for messages.
    """
    noise = _noise(curve)
    widths = [_width(width, sweep, noise, name) for width, sweep in curve.sweeps.items()]
    step = _step(curve)
    moved = _moved(widths, step)
    transfers, why = _verdict(curve, widths, moved)
    return Found(curve.variant, curve.convention, widths, step, noise, moved, transfers, why)


def _noise(curve: Curve) -> float:
    """Return the noise of a loss around the optima, pooled over widths."""
    squares, freedom = 0.0, 0
    for sweep in curve.sweeps.values():
        if len(around := sweep.around) > 1:
            blocks = fit_blocks({point.value: dict(point.losses) for point in around})
            if blocks.freedom:
                squares += blocks.freedom * blocks.sigma**2
                freedom += blocks.freedom
    return math.sqrt(squares / freedom) if freedom else math.nan


def _width(width: int, sweep: Sweep, noise: float, name: str) -> Width:
    points: list[dict[str, object]] = [
        {
            "value": point.value,
            "losses": {str(seed): loss for seed, loss in point.losses.items()},
            "mean": point.mean,
        }
        for point in sweep.points
    ]
    if sweep.best is None:
        return Width(width, points, None, math.nan, None, math.nan, math.nan, math.nan)
    best = sweep.points[sweep.best]
    optimum = _optimum(sweep, noise, name)
    return Width(width, points, best.value, best.mean, sweep.edge, *optimum)


def _optimum(sweep: Sweep, noise: float, name: str) -> tuple[float, float, float]:
    """Return where a curve is lowest and the ends of its interval."""
    assert sweep.best is not None
    measured = (sweep.points[sweep.best].value, math.nan, math.nan)
    pairs = [(p.value, loss) for p in sweep.points for loss in p.losses.values()]
    values, losses = zip(*pairs, strict=True)
    try:
        found = minimum_interval(values, losses, 0.0 if math.isnan(noise) else noise, name=name)
    except StudyError:  # at an edge, or beside a run that diverged: there is no parabola
        return measured
    if math.isnan(noise):
        return found.value, math.nan, math.nan
    return found.value, found.low, found.high


def _step(curve: Curve) -> float:
    """Return how many times the value before a value of the grid is, NaN before anything was run."""
    for sweep in curve.sweeps.values():
        values = [point.value for point in sweep.points]
        return statistics.median(b / a for a, b in itertools.pairwise(values))
    return math.nan


def _moved(widths: list[Width], step: float) -> float:
    places = [w.optimum for w in widths]
    if not places or any(math.isnan(place) for place in places):
        return math.nan
    return max(abs(math.log(place / places[0])) for place in places) / math.log(step)


def _verdict(curve: Curve, widths: list[Width], moved: float) -> tuple[bool | None, str]:
    missing = any(not point.losses for sweep in curve.sweeps.values() for point in sweep.points)
    if missing or len(widths) < 2:
        return None, "runs are missing"
    lost = [w.width for w in widths if w.best is None]
    if lost:
        return False, f"every run diverged at width {lost[0]}"
    edges = [f"{w.width} ({w.edge})" for w in widths if w.edge]
    moves = f"the optimum moves {moved:.2f} grid steps"
    if edges:
        return False, f"the optimum is at the edge at width {', '.join(edges)}; {moves}"
    return moved < 1, moves
