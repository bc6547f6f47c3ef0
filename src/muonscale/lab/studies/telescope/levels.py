"""The levels of a telescope, as far as losses tell where they lie.

A level is swept; if its best place lies at an end of the grid and is told apart from those inside, the
grid grows there by one line of places, as often as is allowed; then the next level is laid around the best place, at twice the width
and half the spacing. All of it is a function of losses.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from muonscale.lab.studies.analysis.seed_blocks import fit_blocks
from muonscale.lab.studies.telescope.grid import End, Grid, Place, points_at

Losses = Mapping[int, float]
"""Held-out loss by seed: infinite of a run that diverged, NaN of one that failed."""
Known = Callable[[int, Place], Losses | None]
"""From a width and a place to the losses there, None while runs are missing."""
StopT = Literal["edge", "diverged", "failed"]
SIGNIFICANT = 0.05
"""Largest p-value at which a loss at an end of a grid counts as lower than those inside."""


@dataclass(frozen=True)
class LevelRule:
    """What the levels follow from, besides losses."""

    widths: tuple[int, ...]
    """Of the levels; each is twice the one before."""
    count: int
    """Number of hyper-parameters."""
    points: int
    """Per hyper-parameter, of the first level."""
    least_points: int
    extend: int
    """Lines that may be added to the grid of each level."""

    def points_at(self, level: int) -> int:
        """Return the points per hyper-parameter of a level before it is extended."""
        return points_at(self.points, level, self.count, self.least_points)

    @property
    def first_grid(self) -> Grid:
        """The grid of the first level before it is extended."""
        return Grid.around((Fraction(0),) * self.count, self.points, 0)


@dataclass(frozen=True)
class Level:
    """One width."""

    number: int
    width: int
    grid: Grid
    """As extended so far."""
    centre: Place | None
    """The optimum of the level before, None of the first one."""
    lines: int
    """Added to the grid."""
    losses: Mapping[Place, Losses]
    """Of the places where all runs have ended."""
    best: Place | None
    """The optimum: the place of the lowest mean loss, or the lowest inside of the grid where one at an
    end is not told apart from it; None before all runs have ended."""
    stop: StopT | None
    """Why there is no level after it: the best place lies at an end and nothing may be added, no
    place has a finite loss, or runs failed."""
    ends: tuple[End, ...]
    """Where the best place lies, if that is the reason."""

    @property
    def done(self) -> bool:
        """Whether it has an optimum to go on from."""
        return self.best is not None and self.stop is None


def mean(losses: Losses) -> float:
    """Return the mean over seeds; infinite if a run diverged, NaN if one failed."""
    return statistics.fmean(losses.values())


def best_place(losses: Mapping[Place, Losses], centre: Place) -> Place | None:
    """Return the place of the lowest finite mean, of equal ones the nearest to the centre."""
    means = {place: mean(each) for place, each in losses.items()}
    finite = [place for place, value in means.items() if math.isfinite(value)]
    distance = {p: sum(abs(a - b) for a, b in zip(p, centre, strict=True)) for p in finite}
    return min(finite, key=lambda p: (means[p], distance[p], p), default=None)


def levels_of(rule: LevelRule, known: Known) -> list[Level]:
    """Return the levels up to the first that is not done.

    Args:
        rule: how they are laid out.
        known: losses found so far.
    """
    levels: list[Level] = []
    centre = None
    for number, width in enumerate(rule.widths):
        level = _level(rule, number, width, centre, known)
        levels.append(level)
        if not level.done:
            break
        centre = level.best
    return levels


def _level(rule: LevelRule, number: int, width: int, centre: Place | None, known: Known) -> Level:
    middle = centre or (Fraction(0),) * rule.count
    grid, lines = Grid.around(middle, rule.points_at(number), number), 0
    while True:
        found = {place: known(width, place) for place in grid.places}
        losses = {place: each for place, each in found.items() if each is not None}
        best, stop, ends = None, None, ()
        if len(losses) == len(found):
            best, stop, ends = _judged(losses, middle, grid)
            if stop == "edge" and lines < rule.extend:
                for end in ends[: rule.extend - lines]:
                    grid, lines = grid.extended(end), lines + 1
                continue
        return Level(number, width, grid, centre, lines, losses, best, stop, ends)


def _judged(
    losses: Mapping[Place, Losses], middle: Place, grid: Grid
) -> tuple[Place | None, StopT | None, tuple[End, ...]]:
    """Return the best place of a whole grid, and what keeps it from being an optimum."""
    if any(math.isnan(mean(each)) for each in losses.values()):
        return None, "failed", ()
    best = best_place(losses, middle)
    if best is None:
        return None, "diverged", ()
    inside = losses
    while ends := grid.ends(best):
        if told := tuple(end for end in ends if _lower(losses, grid, best, end, middle)):
            return best, "edge", told
        # Nothing says that the loss goes on to fall there: a hyper-parameter that hardly matters has
        # its lowest loss anywhere, and would have grids grow for ever.
        inside = {p: each for p, each in inside.items() if not set(ends) & set(grid.ends(p))}
        best = best_place(inside, middle)
        if best is None:
            return best_place(losses, middle), "edge", tuple(ends)
    return best, None, ()


def _lower(
    losses: Mapping[Place, Losses], grid: Grid, best: Place, end: End, middle: Place
) -> bool:
    """Return whether the loss at an end is told apart from the lowest that is not at that end.

    One-sided p < `SIGNIFICANT` after Bonferroni's correction for the place and its neighbours, of
    which it is the lowest; without the noise of seeds, lower is enough.
    """
    others = {p: each for p, each in losses.items() if end not in grid.ends(p)}
    rival = best_place(others, middle)
    if rival is None:
        return True
    near = {*grid.near(best), *grid.near(rival)}
    finite = {p: losses[p] for p in near if p in losses and math.isfinite(mean(losses[p]))}
    found = fit_blocks(finite).difference(best, rival)
    return found.freedom == 0 or found.p * len(finite) < SIGNIFICANT
