"""The findings of a telescope, from the optimum of every level and its noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import CONFIDENCE, stretch
from muonscale.lab.fits.laws.quadratic import fit_minimum, minimum_interval
from muonscale.lab.studies.analysis.seed_blocks import Blocks, fit_blocks
from muonscale.lab.studies.telescope.config import TelescopeConfig
from muonscale.lab.studies.telescope.drift import fit_drift
from muonscale.lab.studies.telescope.grid import Place
from muonscale.lab.studies.telescope.law import fit_width_law
from muonscale.lab.studies.telescope.levels import SIGNIFICANT, Level, Losses, mean_loss

RESAMPLES = 400
"""Curves drawn for an interval."""


@dataclass(frozen=True)
class Optimum:
    """The minimum of a level along one hyper-parameter, with the others near their best values."""

    at: float
    """Minimum of a parabola through the best value and its two neighbors; NaN where there is
    none."""
    low: float
    high: float
    """Ends of its 90 % interval under the noise of seeds; NaN with one seed."""
    closed: bool
    """Whether the interval ends before the grid does."""
    note: str
    """Why there is no parabola."""


@dataclass(frozen=True)
class PreviousOptimum:
    """How the optimum of the level before, the middle of the grid, performs at a level."""

    gap: float
    """Its loss minus the lowest, nats per token; infinite if it diverged."""
    low: float
    high: float
    """Ends of the 90 % interval of the gap, seed by seed."""
    p: float
    """One-sided p-value times the number of places that could have been better (Bonferroni)."""
    within: bool | None
    """Whether it is within seed noise of the lowest; None without noise to judge by."""


@dataclass(frozen=True)
class LevelAnalysis:
    """One width."""

    width: int
    shape: list[int]
    """Points of each hyper-parameter, added ones included."""
    lines: int
    """Lines added to the grid."""
    places: list[dict[str, Any]]
    """Values of the hyper-parameters, losses by seed (infinite: diverged) and their mean."""
    missing: int
    """Places that have not ended."""
    best: dict[str, float] | None = None
    """Values of the optimum."""
    loss: float = math.nan
    sigma: float = math.nan
    """Noise of a loss, without seed effects, from the best place and its neighbors."""
    freedom: int = 0
    optima: dict[str, Optimum] = field(default_factory=dict)
    before: PreviousOptimum | None = None


def analyze_telescope(
    config: TelescopeConfig, levels: list[Level], chosen: Place | None, target: Mapping[int, float]
) -> dict[str, Any]:
    """Return the findings about all levels, as plain values."""
    found = [analyze_level(config, level) for level in levels]
    lowest = {level.width: level.losses[level.best] for level in levels if level.best is not None}
    if target:
        lowest[config.target_width] = target
    return {
        "hyperparameters": {name: item.key for name, item in config.hyperparameters.items()},
        "levels": [asdict(level) for level in found],
        "stopped": describe_stop(config, levels[-1]),
        "chosen": None if chosen is None else config.values(chosen),
        "stop_earlier": find_early_stop(found) if chosen is not None else None,
        "drift": fit_drift(config, levels),
        "target": {"width": config.target_width, "losses": {str(s): x for s, x in target.items()}},
        "law": fit_width_law(lowest),
    }


def analyze_level(config: TelescopeConfig, level: Level) -> LevelAnalysis:
    """Return the findings about a level."""
    places = [
        {
            "values": config.values(place),
            "losses": {str(seed): loss for seed, loss in each.items()},
            "mean": mean_loss(each),
        }
        for place, each in level.losses.items()
    ]
    missing = len(level.grid.places) - len(places)
    known = (level.width, list(level.grid.shape), level.lines, places, missing)
    if level.best is None:
        return LevelAnalysis(*known)
    blocks = fit_noise(level.losses, level.grid.near(level.best))
    previous = None
    if level.center is not None and level.stop is None:
        previous = judge_previous_optimum(level, level.center)
    return LevelAnalysis(
        *known,
        best=config.values(level.best),
        loss=mean_loss(level.losses[level.best]),
        sigma=blocks.sigma,
        freedom=blocks.freedom,
        optima={
            name: find_optimum(config, level, number, blocks)
            for number, name in enumerate(config.hyperparameters)
        },
        before=previous,
    )


def fit_noise(losses: Mapping[Place, Losses], places: list[Place]) -> Blocks[Place]:
    """Return means and noise of the places that did not diverge."""
    return fit_blocks({p: losses[p] for p in places if math.isfinite(mean_loss(losses[p]))})


def find_optimum(
    config: TelescopeConfig, level: Level, number: int, blocks: Blocks[Place]
) -> Optimum:
    """Return the minimum of a level along one hyper-parameter.

    The parabola is fitted to the lines through the best place and its neighbors. To the second
    order of the spacing their mean is lowest where the line through the best place is, and it has
    less noise: the best place was picked for being low. Lines with runs that diverged at other
    values than on the line of the best place are left out.
    """
    best, grid = level.best, level.grid
    assert best is not None
    name = list(config.hyperparameters)[number]

    def finite_on(place: Place) -> list[bool]:
        return [math.isfinite(mean_loss(level.losses[p])) for p in grid.line(place, number)]

    runs = [
        (config.values(place)[name], loss)
        for neighbor in grid.near(best)
        if neighbor[number] == best[number] and finite_on(neighbor) == finite_on(best)
        for place in grid.line(neighbor, number)
        for loss in level.losses[place].values()
    ]
    x, y = [value for value, _ in runs], [loss for _, loss in runs]
    try:
        if blocks.freedom == 0:
            return Optimum(fit_minimum(x, y, name=name).at, math.nan, math.nan, False, "")
        # The noise is estimated from few degrees of freedom: Student's quantile, not the normal.
        noise = blocks.sigma * stretch(CONFIDENCE, blocks.freedom)
        found = minimum_interval(x, y, noise, resamples=RESAMPLES, name=name)
    except StudyError as error:
        return Optimum(math.nan, math.nan, math.nan, False, str(error))
    closed = min(x) < found.low and found.high < max(x)
    return Optimum(found.value, found.low, found.high, closed, "")


def judge_previous_optimum(level: Level, center: Place) -> PreviousOptimum | None:
    """Return how the optimum of the level before performs; None if the grid is that place alone."""
    assert level.best is not None
    others = [place for place, each in level.losses.items() if math.isfinite(mean_loss(each))]
    if len(level.grid.places) == 1:
        return None
    if center not in others:
        return PreviousOptimum(math.inf, math.nan, math.nan, 0.0, False)
    near = level.grid.near(level.best)
    blocks = fit_noise(level.losses, [*near, *([] if center in near else [center])])
    if blocks.freedom == 0:  # without noise the lowest place may be the lowest by luck
        gap = mean_loss(level.losses[center]) - mean_loss(level.losses[level.best])
        return PreviousOptimum(gap, math.nan, math.nan, math.nan, None)
    if center == level.best:
        return PreviousOptimum(0.0, 0.0, 0.0, 1.0, True)
    down = blocks.difference(level.best, center)
    p = min(1.0, down.p * (len(others) - 1))
    return PreviousOptimum(-down.estimate, -down.high, -down.low, p, p >= SIGNIFICANT)


def find_early_stop(levels: list[LevelAnalysis]) -> dict[str, Any]:
    """Return after which width calibration could have stopped.

    It is the first width from which on the optimum of the width before is within seed noise of the
    lowest loss of each level. Levels of a single place do not count.
    """
    tested = [(level.width, level.before.within) for level in levels[1:] if level.before]
    if not tested:
        return {"width": None, "note": "no level after the first has more than one place"}
    if any(within is None for _, within in tested):
        return {"width": None, "note": "one seed gives no noise to judge by"}
    moved = [width for width, within in tested if not within]
    if moved and moved[-1] == tested[-1][0]:
        note = f"the optimum still moved beyond seed noise at width {moved[-1]}"
        return {"width": None, "note": note}
    stop = moved[-1] if moved else levels[0].width
    after = ", ".join(str(width) for width, _ in tested if width > stop)
    note = (
        f"calibration could have stopped at width {stop}: at {after} the optimum of the width "
        "before was within seed noise of the lowest loss"
    )
    return {"width": stop, "note": note}


def describe_stop(config: TelescopeConfig, level: Level) -> str | None:
    """Return why no level follows the last one, unless it is that runs are missing."""
    where = f"width {level.width}: "
    if level.stop == "failed":
        return (
            f"{where}runs failed, and the optimum may be at their places; see their reasons above"
        )
    if level.stop == "diverged":
        return f"{where}every place of the grid diverged; lower the center of the learning rate"
    if level.stop == "edge":
        assert level.best is not None
        values, names = config.values(level.best), list(config.hyperparameters)
        ends = " and ".join(
            f"the {'highest' if side > 0 else 'lowest'} {names[number]} that was tried, "
            f"{values[names[number]]:g}"
            for number, side in level.ends
        )
        return (
            f"{where}the lowest loss is at {ends}, and no more lines may be added to the grid "
            f"(extend={config.extend}). Raise extend to continue, or move the center"
        )
    return None
