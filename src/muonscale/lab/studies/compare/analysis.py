"""What a comparison finds at one place: best learning rates, differences, what it takes to draw level."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from muonscale.errors import StudyError
from muonscale.lab.fits.statistics import adjust_holm
from muonscale.lab.studies.analysis.reach import Reach, reach
from muonscale.lab.studies.analysis.seed_blocks import CLAIM, Blocks, fit_blocks, mean_interval
from muonscale.lab.studies.analysis.sweep import EdgeT, Sweep
from muonscale.lab.studies.study import Coordinate, Outcome

VerdictT = Literal["better", "likely better", "not told apart"]


@dataclass(frozen=True)
class Place:
    """The runs at one place."""

    name: Mapping[str, Coordinate]
    """Value of every axis."""
    baselines: list[str]
    sweeps: Mapping[str, Sweep]
    """Of the tuning runs, by variant."""
    confirmed: Mapping[str, list[Outcome]]
    """Runs of other seeds at the best learning rate, by variant."""
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Variant:
    """One optimizer at one place."""

    name: str
    points: list[dict[str, object]]
    """Learning rates: lr, losses by seed (None: diverged), their mean, how many diverged."""
    best_lr: float | None
    edge: EdgeT | None
    """Where the best learning rate is the lowest or the highest that was tried."""
    loss: float
    """Mean at the best learning rate, of the seeds that are compared."""
    low: float
    high: float
    """Ends of its 90 % interval, the luck of the seed included."""
    perplexity: tuple[float, float, float]
    """exp of the three."""
    reach: dict[str, dict[str, Reach]] = field(default_factory=dict)
    """What it spends until it has a baseline's final loss, by baseline and measure."""


@dataclass(frozen=True)
class Comparison:
    """Whether one variant is better than another."""

    better: str
    worse: str
    difference: float
    """Of losses, nats per token; below zero."""
    low: float
    high: float
    """Ends of its 90 % interval, seed by seed."""
    p: float
    """One-sided."""
    p_adjusted: float
    """For the number of comparisons, by Holm's method."""
    verdict: VerdictT
    """`better` by the noise rule (adjusted p < 0.001); `likely better` if the 90 % interval lies below
    zero and the rule is not met."""


@dataclass(frozen=True)
class Found:
    """What was found at one place."""

    place: Mapping[str, Coordinate]
    variants: list[Variant]
    comparisons: list[Comparison]
    sigma: float
    """Noise of a loss, seed effects taken out."""
    freedom: int
    notes: list[str]
    """What keeps an answer from being given."""


def found_at(place: Place) -> Found:
    """Return what was found at a place."""
    notes: list[str] = []
    compared = _compared(place)
    variants = [_variant(place, name, compared) for name in place.sweeps]
    variants = _with_reach(variants, place.baselines, compared)
    sigma, freedom, comparisons = math.nan, 0, []
    try:
        blocks = _blocks(place, compared)
        sigma, freedom = blocks.sigma, blocks.freedom
        best = [(name, lr) for name, (lr, runs) in compared.items() if _whole(runs)]
        comparisons = _comparisons(blocks, best)
    except StudyError as error:
        notes.append(str(error))
    if freedom == 0 and not notes:
        notes.append("with one seed there is no noise to judge differences by: give two at least")
    return Found(place.name, variants, comparisons, sigma, freedom, notes)


Compared = Mapping[str, tuple[float, list[Outcome]]]
"""Best learning rate and the runs that are compared, by variant."""


def _compared(place: Place) -> Compared:
    """Return the runs at the best learning rate: the confirming ones where there are any."""
    found = {}
    for name, sweep in place.sweeps.items():
        if sweep.best is None:
            continue
        lr = sweep.points[sweep.best].value
        own = place.confirmed[name] or [
            o
            for o in place.outcomes
            if o.run.coordinates["variant"] == name and o.run.coordinates["lr"] == lr
        ]
        found[name] = (lr, [o for o in own if not math.isnan(o.loss)])
    return found


def _whole(runs: list[Outcome]) -> bool:
    return bool(runs) and all(math.isfinite(run.loss) for run in runs)


def _variant(place: Place, name: str, compared: Compared) -> Variant:
    sweep = place.sweeps[name]
    points: list[dict[str, object]] = [
        {
            "lr": point.value,
            "losses": {str(seed): loss for seed, loss in point.losses.items()},
            "mean": point.mean,
            "diverged": sum(math.isinf(loss) for loss in point.losses.values()),
        }
        for point in sweep.points
    ]
    if name not in compared or not _whole(compared[name][1]):
        nothing = (math.nan, math.nan, math.nan)
        lr = compared[name][0] if name in compared else None
        return Variant(name, points, lr, sweep.edge, *nothing, nothing)
    groups = [[run.loss for run in runs] for _, runs in compared.values() if _whole(runs)]
    own = [run.loss for run in compared[name][1]]
    mean, low, high = mean_interval(groups, groups.index(own))
    perplexity = (math.exp(mean), math.exp(low), math.exp(high))
    return Variant(name, points, compared[name][0], sweep.edge, mean, low, high, perplexity)


def _with_reach(variants: list[Variant], baselines: list[str], compared: Compared) -> list[Variant]:
    losses = {v.name: v.loss for v in variants}
    runs = {name: each for name, (_, each) in compared.items()}
    found = {name: reach(losses[name], runs) for name in baselines}
    return [
        replace(v, reach={name: each[v.name] for name, each in found.items() if v.name in each})
        for v in variants
    ]


Cell = tuple[str, float]
"""Variant and learning rate."""


def _blocks(place: Place, compared: Compared) -> Blocks[Cell]:
    """Return means and noise: of confirming runs, else of the best points and those beside them."""
    if any(place.confirmed.values()):
        losses = {
            (name, lr): {int(r.run.coordinates["seed"]): r.loss for r in runs}
            for name, (lr, runs) in compared.items()
            if _whole(runs)
        }
    else:
        losses = {
            (name, point.value): dict(point.losses)
            for name, sweep in place.sweeps.items()
            for point in sweep.around
        }
    return fit_blocks(losses)


def _comparisons(blocks: Blocks[Cell], best: list[Cell]) -> list[Comparison]:
    """Compare every two variants, both ways round, and return those that are lower."""
    pairs = list(itertools.permutations(best, 2))
    found = [blocks.difference(a, b) for a, b in pairs]
    adjusted = adjust_holm([difference.p for difference in found])
    return [
        Comparison(a, b, d.estimate, d.low, d.high, d.p, p, _verdict(d.high, p))
        for ((a, _), (b, _)), d, p in zip(pairs, found, adjusted, strict=True)
        if d.estimate < 0
    ]


def _verdict(high: float, p: float) -> VerdictT:
    if math.isnan(p) or high >= 0:
        return "not told apart"
    return "better" if p < CLAIM else "likely better"
