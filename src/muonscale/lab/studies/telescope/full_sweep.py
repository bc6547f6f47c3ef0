"""A telescope against a full sweep at the calibration width: what its choice loses, and what it saves."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from muonscale.lab.studies.account import Account
from muonscale.lab.studies.analysis.seed_blocks import Difference, fit_blocks
from muonscale.lab.studies.study import Outcomes
from muonscale.lab.studies.telescope.grid import Grid, Place
from muonscale.lab.studies.telescope.levels import Level, Losses, best_place, mean

if TYPE_CHECKING:
    from muonscale.lab.studies.telescope.study import Telescope

LARGEST_SHARE = 0.5
"""Of the operations of the full sweep, for telescoping to be worth it."""


@dataclass(frozen=True)
class BruteForce:
    """Both choices at the calibration width."""

    width: int
    missing: int
    """Places of the full sweep that have not ended, or failed."""
    best: dict[str, float]
    """Where the full sweep is lowest."""
    at_end: bool
    """Whether that is at an end of its grid."""
    loss: float
    telescoped: float
    """Loss of the telescope's choice."""
    difference: float
    """The telescope's less the sweep's, nats per token."""
    low: float
    high: float
    """Ends of its 90 % interval, seed by seed."""
    within_noise: bool | None
    """Whether the interval reaches down to zero; None with one seed."""
    flops: list[int]
    """Of all levels, and of the full sweep."""
    seconds: list[float | None]
    passed: bool | None
    """Within seed noise at no more than half the operations."""


def brute_force_found(
    study: Telescope, levels: list[Level], outcomes: Outcomes, spent: Account
) -> dict[str, Any] | None:
    """Return the comparison; None where there is no full sweep, or nothing to compare yet."""
    config, chosen, grid = study.config, study.chosen(levels), study.config.rule.first_grid
    if chosen is None or not config.brute_force:
        return None
    known = {p: study.known(outcomes, config.calibration_width, p) for p in grid.places}
    losses = {p: each for p, each in known.items() if each is not None and _ended_well(each)}
    best = best_place(losses, grid.places[0])
    if best is None:
        return None
    found = difference(levels[-1], chosen, grid, losses, best)
    within = None if math.isnan(found.low) else found.low <= 0
    ours, full = spent.sum("tuning"), spent.sum("check")
    cheap = ours.flops <= LARGEST_SHARE * full.flops
    return asdict(
        BruteForce(
            width=config.calibration_width,
            missing=len(grid.places) - len(losses),
            best=config.values(best),
            at_end=bool(grid.ends(best)),
            loss=mean(losses[best]),
            telescoped=mean(levels[-1].losses[chosen]),
            difference=found.estimate,
            low=found.low,
            high=found.high,
            within_noise=within,
            flops=[ours.flops, full.flops],
            seconds=[ours.seconds, full.seconds],
            passed=None if within is None else within and cheap,
        )
    )


def _ended_well(losses: Losses) -> bool:
    return not math.isnan(mean(losses))


def difference(
    level: Level, chosen: Place, grid: Grid, losses: dict[Place, Losses], best: Place
) -> Difference:
    """Return the loss of the telescope's place less that of the sweep's, with the noise around both."""
    if chosen == best:
        return Difference(0.0, 0.0, 0.0, 0.5, 0)
    around = {p: losses[p] for p in grid.near(best) if p in losses}
    around |= {p: level.losses[p] for p in level.grid.near(chosen)}
    finite = {p: each for p, each in around.items() if math.isfinite(mean(each))}
    return fit_blocks(finite).difference(chosen, best)
