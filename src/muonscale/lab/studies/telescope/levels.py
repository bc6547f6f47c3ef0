"""The levels of a telescope that follow from the losses measured so far.

A level is a grid at one width. If its best place is at an end of the grid, and significantly better
than the places inside, the grid grows there by a line of places, as often as allowed. The next
level is laid around the best place, at twice the width and half the spacing. All of it is a
function of losses.
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
"""Validation loss by seed: infinite for a run that diverged, NaN for one that failed."""
Known = Callable[[int, Place], Losses | None]
"""Maps a width and a place to the losses there, None while runs are missing."""
StopT = Literal["edge", "diverged", "failed"]
SIGNIFICANT = 0.05
"""Largest p-value at which a loss at an end of a grid counts as lower than those inside."""


@dataclass(frozen=True)
class LevelRule:
    """What determines the levels, apart from losses."""

    widths: tuple[int, ...]
    """Width of each level, twice the one before."""
    count: int
    """Number of hyper-parameters."""
    points: int
    """Points per hyper-parameter of the first level."""
    least_points: int
    extend: int
    """Most lines to add to the grid of a level."""

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
    """The grid as extended so far."""
    center: Place | None
    """The optimum of the level before, None for the first level."""
    lines: int
    """Lines added to the grid."""
    losses: Mapping[Place, Losses]
    """Losses of the places where all runs have ended."""
    best: Place | None
    """The optimum: the place of the lowest mean loss, or the best place inside the grid if one at
    an end is not significantly better; None before all runs have ended."""
    stop: StopT | None
    """Why no level follows: the best place is at an end and no line may be added, no place has a
    finite loss, or runs failed."""
    ends: tuple[End, ...]
    """The ends at which the best place is, if `stop` is `edge`."""

    @property
    def done(self) -> bool:
        """Whether the next level can start from its optimum."""
        return self.best is not None and self.stop is None


def mean_loss(losses: Losses) -> float:
    """Return the mean over seeds; infinite if a run diverged, NaN if one failed."""
    return statistics.fmean(losses.values())


def best_place(losses: Mapping[Place, Losses], center: Place) -> Place | None:
    """Return the place of the lowest finite mean; of equal ones, the nearest to the center."""
    means = {place: mean_loss(each) for place, each in losses.items()}
    finite = [place for place, value in means.items() if math.isfinite(value)]
    distance = {p: sum(abs(a - b) for a, b in zip(p, center, strict=True)) for p in finite}
    return min(finite, key=lambda p: (means[p], distance[p], p), default=None)


def build_levels(rule: LevelRule, known: Known) -> list[Level]:
    """Return the levels up to the first that is not done."""
    levels: list[Level] = []
    center = None
    for number, width in enumerate(rule.widths):
        level = _build_level(rule, number, width, center, known)
        levels.append(level)
        if not level.done:
            break
        center = level.best
    return levels


def _build_level(
    rule: LevelRule, number: int, width: int, center: Place | None, known: Known
) -> Level:
    middle = center or (Fraction(0),) * rule.count
    grid, lines = Grid.around(middle, rule.points_at(number), number), 0
    while True:
        found = {place: known(width, place) for place in grid.places}
        losses = {place: each for place, each in found.items() if each is not None}
        best, stop, ends = None, None, ()
        if len(losses) == len(found):
            best, stop, ends = _judge(losses, middle, grid)
            if stop == "edge" and lines < rule.extend:
                for end in ends[: rule.extend - lines]:
                    grid, lines = grid.extended(end), lines + 1
                continue
        return Level(number, width, grid, center, lines, losses, best, stop, ends)


def _judge(
    losses: Mapping[Place, Losses], middle: Place, grid: Grid
) -> tuple[Place | None, StopT | None, tuple[End, ...]]:
    """Return the best place of a finished grid, and what keeps it from being an optimum."""
    if any(math.isnan(mean_loss(each)) for each in losses.values()):
        return None, "failed", ()
    best = best_place(losses, middle)
    if best is None:
        return None, "diverged", ()
    inside = losses
    while ends := grid.ends(best):
        if lower := tuple(end for end in ends if _is_lower(losses, grid, best, end, middle)):
            return best, "edge", lower
        # Nothing shows that the loss keeps falling there. A hyper-parameter that hardly matters has
        # its lowest loss anywhere, and would make grids grow forever.
        inside = {p: each for p, each in inside.items() if not set(ends) & set(grid.ends(p))}
        best = best_place(inside, middle)
        if best is None:
            return best_place(losses, middle), "edge", tuple(ends)
    return best, None, ()


def _is_lower(
    losses: Mapping[Place, Losses], grid: Grid, best: Place, end: End, middle: Place
) -> bool:
    """Return whether the loss at an end is significantly lower than the lowest away from that end.

    The test is one-sided with p < `SIGNIFICANT`, after Bonferroni's correction for the place and
    its neighbors, of which it is the lowest. Without the noise of seeds, lower is enough.
    """
    others = {p: each for p, each in losses.items() if end not in grid.ends(p)}
    rival = best_place(others, middle)
    if rival is None:
        return True
    near = {*grid.near(best), *grid.near(rival)}
    finite = {p: losses[p] for p in near if p in losses and math.isfinite(mean_loss(losses[p]))}
    found = fit_blocks(finite).difference(best, rival)
    return found.freedom == 0 or found.p * len(finite) < SIGNIFICANT
