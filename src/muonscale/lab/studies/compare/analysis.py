"""The comparison at one place: best learning rates, differences, cost to a baseline's loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from muonscale.errors import StudyError
from muonscale.lab.fits.statistics import adjust_holm
from muonscale.lab.studies.analysis.reach import Reach, reach
from muonscale.lab.studies.analysis.seed_blocks import CLAIM, fit_blocks, mean_interval
from muonscale.lab.studies.analysis.sweep import EdgeT, Sweep, build_sweep
from muonscale.lab.studies.planned_run import Coordinate
from muonscale.lab.studies.study import Outcome, collect_losses

VerdictT = Literal["better", "likely better", "not significantly different"]


@dataclass(frozen=True)
class ComparedRuns:
    """The runs of one variant at one place."""

    sweep: Sweep
    """Tuning runs over the learning rate."""
    confirmed: bool
    """Whether there are runs of other seeds at the best learning rate."""
    at_best: list[Outcome]
    """The runs that are compared: the confirming ones, else the tuning runs at the best learning
    rate."""

    @classmethod
    def of(cls, tuning: list[Outcome], confirming: list[Outcome]) -> ComparedRuns:
        """Return the runs of a variant from its tuning and confirming ones."""
        sweep = build_sweep(tuning, "lr")
        best = None if sweep.best is None else sweep.points[sweep.best].value
        own = confirming or [o for o in tuning if o.run.coordinates["lr"] == best]
        compared = [] if best is None else [o for o in own if not math.isnan(o.loss)]
        return cls(sweep, bool(confirming), compared)

    @property
    def best_lr(self) -> float | None:
        """The learning rate with the lowest mean loss."""
        return None if self.sweep.best is None else self.sweep.points[self.sweep.best].value

    @property
    def whole(self) -> bool:
        """Whether compared runs have ended and none diverged."""
        return bool(self.at_best) and all(math.isfinite(run.loss) for run in self.at_best)


@dataclass(frozen=True)
class VariantAnalysis:
    """One optimizer at one place."""

    name: str
    points: list[dict[str, Any]]
    """Learning rates: lr, losses by seed (None: diverged), their mean, the number of diverged
    runs."""
    best_lr: float | None
    edge: EdgeT | None
    """Whether the best learning rate is the lowest or the highest that was tried."""
    loss: float = math.nan
    """Mean loss at the best learning rate, of the seeds that are compared."""
    low: float = math.nan
    high: float = math.nan
    """Ends of its 90 % interval, the luck of the seed included."""
    perplexity: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    """exp of the loss and of the ends of its interval."""
    reach: dict[str, dict[str, Reach]] = field(default_factory=dict)
    """What it spends until it has a baseline's final loss, by baseline and measure."""


@dataclass(frozen=True)
class VariantComparison:
    """Whether one variant is better than another."""

    better: str
    worse: str
    difference: float
    """Difference of losses, nats per token; below zero."""
    low: float
    high: float
    """Ends of its 90 % interval, seed by seed."""
    p: float
    """One-sided p-value."""
    p_adjusted: float
    """p-value adjusted for the number of comparisons by Holm's method."""
    verdict: VerdictT
    """`better` by the noise rule (adjusted p < 0.001); `likely better` if only the 90 % interval is
    below zero."""


@dataclass(frozen=True)
class CompareAnalysis:
    """The comparison at one place."""

    place: Mapping[str, Coordinate]
    variants: list[VariantAnalysis]
    comparisons: list[VariantComparison]
    sigma: float
    """Noise of a loss, without seed effects."""
    freedom: int
    notes: list[str]
    """Reasons why there is no answer."""


def analyze_place(
    place: Mapping[str, Coordinate], baselines: list[str], runs: Mapping[str, ComparedRuns]
) -> CompareAnalysis:
    """Return the comparison at a place."""
    variants = [_analyze_variant(name, runs) for name in runs]
    losses = {v.name: v.loss for v in variants}
    at_best = {name: own.at_best for name, own in runs.items() if own.sweep.best is not None}
    reached = {name: reach(losses[name], at_best) for name in baselines}
    variants = [
        replace(v, reach={name: each[v.name] for name, each in reached.items() if v.name in each})
        for v in variants
    ]
    # The noise is that of the confirming runs, else of the best learning rates and their neighbors.
    points: dict[tuple[str, float], Mapping[int, float]] = {}
    confirmed = any(own.confirmed for own in runs.values())
    for name, own in runs.items():
        if not confirmed:
            points |= {(name, point.value): point.losses for point in own.sweep.around}
        elif own.whole and own.best_lr is not None:
            points[name, own.best_lr] = collect_losses(own.at_best)
    try:
        blocks = fit_blocks(points)
    except StudyError as error:
        return CompareAnalysis(place, variants, [], math.nan, 0, [str(error)])
    best = [(name, own.best_lr) for name, own in runs.items() if own.whole and own.best_lr]
    pairs = list(itertools.permutations(best, 2))
    differences = [blocks.difference(a, b) for a, b in pairs]
    adjusted = adjust_holm([difference.p for difference in differences])
    comparisons = [
        VariantComparison(a, b, d.estimate, d.low, d.high, d.p, p, _judge(d.high, p))
        for ((a, _), (b, _)), d, p in zip(pairs, differences, adjusted, strict=True)
        if d.estimate < 0
    ]
    note = "one seed gives no noise to judge differences by; give two seeds or more"
    notes = [] if blocks.freedom else [note]
    return CompareAnalysis(place, variants, comparisons, blocks.sigma, blocks.freedom, notes)


def _analyze_variant(name: str, runs: Mapping[str, ComparedRuns]) -> VariantAnalysis:
    own = runs[name]
    points = [
        p.row("lr") | {"diverged": sum(math.isinf(loss) for loss in p.losses.values())}
        for p in own.sweep.points
    ]
    found = VariantAnalysis(name, points, own.best_lr, own.sweep.edge)
    if not own.whole:
        return found
    groups = {n: [run.loss for run in each.at_best] for n, each in runs.items() if each.whole}
    mean, low, high = mean_interval(list(groups.values()), list(groups).index(name))
    perplexity = (math.exp(mean), math.exp(low), math.exp(high))
    return replace(found, loss=mean, low=low, high=high, perplexity=perplexity)


def _judge(high: float, p: float) -> VerdictT:
    if math.isnan(p) or high >= 0:
        return "not significantly different"
    return "better" if p < CLAIM else "likely better"
