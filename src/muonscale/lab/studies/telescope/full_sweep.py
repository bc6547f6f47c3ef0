"""A telescope against a full sweep at one width: what its choice loses and saves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from muonscale.lab.studies.analysis.seed_blocks import MeanDifference, fit_blocks
from muonscale.lab.studies.cost import Account
from muonscale.lab.studies.telescope.config import TelescopeConfig
from muonscale.lab.studies.telescope.grid import Place
from muonscale.lab.studies.telescope.levels import Losses, best_place, mean_loss

LARGEST_SHARE = 0.5
"""Largest share of the FLOPs of the full sweep at which telescoping is worth it."""


@dataclass(frozen=True)
class FullSweep:
    """The choices of telescope and full sweep at the width of the sweep."""

    width: int
    missing: int
    """Places of the full sweep that have not ended, or failed."""
    best: dict[str, float]
    """Values at which the full sweep is lowest."""
    at_end: bool
    """Whether that place is at an end of the grid."""
    loss: float
    telescoped: float
    """Loss of the telescope's choice."""
    difference: float
    """Loss of the telescope's choice minus that of the sweep's, nats per token."""
    low: float
    high: float
    """Ends of its 90 % interval, seed by seed."""
    within_noise: bool | None
    """Whether the interval includes zero or less; None with one seed."""
    flops: list[int]
    """FLOPs of all levels, and of the full sweep."""
    seconds: list[float | None]
    passed: bool | None
    """Whether it is within seed noise at no more than half the FLOPs."""


def compare_full_sweep(
    config: TelescopeConfig,
    width: int,
    telescoped: Mapping[Place, Losses],
    chosen: Place,
    sweep: Mapping[Place, Losses | None],
    spent: Account,
) -> dict[str, Any] | None:
    """Return the comparison; None if no place of the sweep has a loss.

    Args:
        config: of the study.
        width: the width of the sweep.
        telescoped: losses of the telescope at that width, at its choice and near it.
        chosen: the telescope's choice.
        sweep: losses of the full sweep by place, None while runs are missing.
        spent: account of the study.
    """
    grid = config.rule.first_grid
    losses = {p: each for p, each in sweep.items() if each and not math.isnan(mean_loss(each))}
    best = best_place(losses, grid.places[0])
    if best is None:
        return None
    around = {p: losses[p] for p in grid.near(best) if p in losses}
    around |= telescoped
    finite = {p: each for p, each in around.items() if math.isfinite(mean_loss(each))}
    blocks = fit_blocks(finite)
    found = MeanDifference(0.0, 0.0, 0.0, 0.5, 0)
    if chosen != best or blocks.freedom == 0:
        found = blocks.difference(chosen, best)
    within = None if math.isnan(found.low) else found.low <= 0
    ours, full = spent.total("tuning"), spent.total("check")
    cheap = ours.flops <= LARGEST_SHARE * full.flops
    return asdict(
        FullSweep(
            width=width,
            missing=len(grid.places) - len(losses),
            best=config.values(best),
            at_end=bool(grid.ends(best)),
            loss=mean_loss(losses[best]),
            telescoped=mean_loss(telescoped[chosen]),
            difference=found.estimate,
            low=found.low,
            high=found.high,
            within_noise=within,
            flops=[ours.flops, full.flops],
            seconds=[ours.seconds, full.seconds],
            passed=None if within is None else within and cheap,
        )
    )
