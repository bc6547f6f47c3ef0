"""What a telescope finds: an optimum per level, with the noise of seeds, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import stretch
from muonscale.lab.fits.laws.quadratic import fit_minimum, minimum_interval
from muonscale.lab.studies.account import account, account_tree
from muonscale.lab.studies.analysis.seed_blocks import LEVEL, Blocks, fit_blocks
from muonscale.lab.studies.cost import study_cost
from muonscale.lab.studies.study import Outcomes
from muonscale.lab.studies.telescope.drift import drift_of
from muonscale.lab.studies.telescope.full_sweep import brute_force_found
from muonscale.lab.studies.telescope.grid import Place
from muonscale.lab.studies.telescope.law import law_of
from muonscale.lab.studies.telescope.levels import SIGNIFICANT, Level, Losses, mean

if TYPE_CHECKING:
    from muonscale.lab.studies.telescope.config import TelescopeConfig
    from muonscale.lab.studies.telescope.study import Telescope

RESAMPLES = 400
"""Curves that an interval is drawn from."""


@dataclass(frozen=True)
class Optimum:
    """The lowest point of a level along one hyper-parameter, the others near their best values."""

    at: float
    """Of a parabola through the best value and its two neighbours; NaN where there is none."""
    low: float
    high: float
    """Ends of its 90 % interval under the noise of seeds; NaN with one seed."""
    closed: bool
    """Whether the interval ends before the grid does."""
    note: str
    """Why there is no parabola."""


@dataclass(frozen=True)
class Before:
    """How the optimum of the level before does at a level: it is the middle of its grid."""

    gap: float
    """Its loss less the lowest, nats per token; infinite where it diverged."""
    low: float
    high: float
    """Ends of the 90 % interval of the gap, seed by seed."""
    p: float
    """One-sided, times the number of other places it could have lost to (Bonferroni)."""
    within: bool | None
    """Whether it is within seed noise of the lowest; None where there is no noise to judge by."""


@dataclass(frozen=True)
class LevelFound:
    """One width."""

    width: int
    shape: list[int]
    """Points of each hyper-parameter, added ones included."""
    lines: int
    """Added to the grid."""
    places: list[dict[str, Any]]
    """Values of the hyper-parameters, losses by seed (infinite: diverged) and their mean."""
    missing: int
    """Places that have not ended."""
    best: dict[str, float] | None
    """Values of the optimum."""
    loss: float
    sigma: float
    """Noise of a loss, seed effects taken out; of the best place and its neighbours."""
    freedom: int
    optima: dict[str, Optimum]
    before: Before | None


def found_in(study: Telescope, outcomes: Outcomes) -> dict[str, Any]:
    """Return what `Telescope.analyse` does."""
    config, levels = study.config, study.levels(outcomes)
    found = [level_found(config, level) for level in levels]
    chosen = study.chosen(levels)
    target = target_losses(study, chosen, outcomes)
    section = config.executor.model_copy(update={"flops_per_second": None})
    expected = study.expected(outcomes)
    runs = {**{e.like.id: e.like for e in expected}, **{id: o.run for id, o in outcomes.items()}}
    spent = account(expected, study_cost(runs, outcomes, section, measure=False))
    return {
        "hyperparameters": {name: item.key for name, item in config.hyperparameters.items()},
        "levels": [asdict(level) for level in found],
        "stopped": stopped_because(config, levels[-1]),
        "chosen": None if chosen is None else config.values(chosen),
        "stop_earlier": stop_earlier(found) if chosen is not None else None,
        "drift": drift_of(config, levels),
        "target": {"width": config.target_width, "losses": {str(s): x for s, x in target.items()}},
        "law": law_of(study, levels, target),
        "brute_force": brute_force_found(study, levels, outcomes, spent),
        "account": account_tree(spent),
    }


def target_losses(study: Telescope, chosen: Place | None, outcomes: Outcomes) -> dict[int, float]:
    """Return the losses of the target by seed, as far as its runs have ended."""
    if chosen is None:
        return {}
    width = study.config.target_width
    ids = {seed: study.run(width, chosen, seed).id for seed in study.config.target_seeds}
    losses = {seed: outcomes[id].loss for seed, id in ids.items() if id in outcomes}
    return {seed: loss for seed, loss in losses.items() if not math.isnan(loss)}


def level_found(config: TelescopeConfig, level: Level) -> LevelFound:
    """Return what is known of a level."""
    places = [
        {
            "values": config.values(place),
            "losses": {str(seed): loss for seed, loss in each.items()},
            "mean": mean(each),
        }
        for place, each in level.losses.items()
    ]
    missing, best = len(level.grid.places) - len(places), level.best
    width, shape, lines = level.width, list(level.grid.shape), level.lines
    if best is None:
        return LevelFound(
            width, shape, lines, places, missing, None, math.nan, math.nan, 0, {}, None
        )
    blocks = noise_of(level.losses, level.grid.near(best))
    optima = {
        name: optimum_along(config, level, number, blocks)
        for number, name in enumerate(config.hyperparameters)
    }
    return LevelFound(
        width=width,
        shape=shape,
        lines=lines,
        places=places,
        missing=missing,
        best=config.values(best),
        loss=mean(level.losses[best]),
        sigma=blocks.sigma,
        freedom=blocks.freedom,
        optima=optima,
        before=None if level.centre is None or level.stop else before_found(level, level.centre),
    )


def noise_of(losses: Mapping[Place, Losses], places: list[Place]) -> Blocks[Place]:
    """Return means and noise of those places that did not diverge."""
    return fit_blocks({p: losses[p] for p in places if math.isfinite(mean(losses[p]))})


def optimum_along(
    config: TelescopeConfig, level: Level, number: int, blocks: Blocks[Place]
) -> Optimum:
    """Return the lowest point of a level along one hyper-parameter."""
    assert level.best is not None
    name = list(config.hyperparameters)[number]
    runs = [
        (config.values(place)[name], loss)
        for line in lines_beside(level, number)
        for place in line
        for loss in level.losses[place].values()
    ]
    x, y = [value for value, _ in runs], [loss for _, loss in runs]
    try:
        if blocks.freedom == 0:
            return Optimum(fit_minimum(x, y, name=name).at, math.nan, math.nan, False, "")
        # The noise is an estimate too, of few degrees of freedom: Student's quantile, not the normal.
        noise = blocks.sigma * stretch(LEVEL, blocks.freedom)
        found = minimum_interval(x, y, noise, resamples=RESAMPLES, name=name)
    except StudyError as error:
        return Optimum(math.nan, math.nan, math.nan, False, str(error))
    closed = min(x) < found.low and found.high < max(x)
    return Optimum(found.value, found.low, found.high, closed, "")


def lines_beside(level: Level, number: int) -> list[list[Place]]:
    """Return the lines along one hyper-parameter through the best place and its neighbours.

    Their mean is lowest where the line through the best place is, to the second order of the spacing,
    and has less noise; the best place alone was picked for being low. Lines are left out where runs
    diverged at other values than on that one.
    """
    best = level.best
    assert best is not None
    places = [place for place in level.grid.near(best) if place[number] == best[number]]
    lines = [level.grid.line(place, number) for place in places]
    finite = [[math.isfinite(mean(level.losses[place])) for place in line] for line in lines]
    own = finite[places.index(best)]
    return [line for line, each in zip(lines, finite, strict=True) if each == own]


def before_found(level: Level, centre: Place) -> Before | None:
    """Return how the optimum of the level before does; None where the grid is that place alone."""
    assert level.best is not None
    others = [place for place, each in level.losses.items() if math.isfinite(mean(each))]
    if len(level.grid.places) == 1:
        return None
    if centre not in others:
        return Before(math.inf, math.nan, math.nan, 0.0, False)
    if centre == level.best:
        return Before(0.0, 0.0, 0.0, 1.0, True)
    near = level.grid.near(level.best)
    blocks = noise_of(level.losses, [*near, *([] if centre in near else [centre])])
    down = blocks.difference(level.best, centre)
    p = min(1.0, down.p * (len(others) - 1)) if blocks.freedom else math.nan
    within = None if math.isnan(p) else p >= SIGNIFICANT
    return Before(-down.estimate, -down.high, -down.low, p, within)


def stop_earlier(levels: list[LevelFound]) -> dict[str, Any]:
    """Return after which width calibration could have stopped.

    It is the first one whose successors all had their middle, the optimum of the width before, within
    seed noise of their lowest loss. Levels of a single place say nothing, and none after them.
    """
    tested = [level for level in levels[1:] if level.before is not None]
    if not tested:
        return {"width": None, "said": "no level after the first has more than one place"}
    if any(level.before is not None and level.before.within is None for level in tested):
        return {"width": None, "said": "with one seed there is no noise to judge by"}
    moved = [level.width for level in tested if level.before and not level.before.within]
    if moved and moved[-1] == tested[-1].width:
        said = f"the optimum still moved beyond seed noise at width {moved[-1]}"
        return {"width": None, "said": said}
    stop = moved[-1] if moved else levels[0].width
    after = ", ".join(str(level.width) for level in tested if level.width > stop)
    said = (
        f"calibration could have stopped at width {stop}: at {after} the optimum of the width before was "
        "within seed noise of the lowest loss"
    )
    return {"width": stop, "said": said}


def stopped_because(config: TelescopeConfig, level: Level) -> str | None:
    """Return why there is no level after the last one, if it is not that runs are missing."""
    where = f"width {level.width}: "
    if level.stop == "failed":
        return where + "runs failed, and the optimum may lie where they are; see why above"
    if level.stop == "diverged":
        return where + "every place of the grid diverged; lower the centre of the learning rate"
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
            f"(extend={config.extend}). Raise extend to go on from here, or move the centre"
        )
    return None
