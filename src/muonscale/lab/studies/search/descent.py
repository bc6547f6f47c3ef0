"""Coordinate descent on a logarithmic grid: which settings to try next, given the losses so far.

From the best setting so far, the two neighbors along one key are tried, then along the next key.
Wherever a lower loss appears the search goes on from there, so an edge is extended until the best
setting is inside. It ends when every neighbor of the best setting was tried and is worse, or at the
largest number of settings. A search that ends early then tries the settings nearest to its best
one. All optimizers therefore try the same number of settings.

All of it is a function of losses, so a study that was stopped goes on with the same settings. The
order of a search depends on its own losses alone, and its length on those of the others: new losses
add settings and never drop one. For this, settings that fill up are tried one at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

Setting = tuple[int, ...]
"""For each searched key, how many steps of the grid its value is above the start."""
LossOf = Callable[[Setting], float | None]
"""Maps a setting to its mean loss: infinite if a run diverged, NaN if one failed, None while runs
are missing."""


@dataclass(frozen=True)
class Descent:
    """A search, as far as losses determine it."""

    tried: tuple[Setting, ...]
    """The settings to try, in their order; those of a search that has not ended may grow."""
    ended: bool
    """Whether all of them have a loss and no more are wanted."""
    best: Setting | None
    """The setting of the lowest finite loss so far."""
    edges: tuple[tuple[int, int], ...]
    """Neighbors of the best setting without a loss: index of the key, and -1 or 1."""

    @property
    def tuned(self) -> bool:
        """Whether every neighbor of the best setting was tried and is not better."""
        return self.ended and self.best is not None and not self.edges


def descend(loss: LossOf, start: Setting, least: int, most: int) -> Descent:
    """Return a search, as far as the losses are known.

    Args:
        loss: the losses.
        start: the first setting.
        least: fewest settings to try.
        most: most settings to try.
    """
    tried = [start]
    while True:
        losses = {setting: loss(setting) for setting in tried}
        known = {s: x for s, x in losses.items() if x is not None}
        best = min(
            (s for s, x in known.items() if math.isfinite(x)), key=known.__getitem__, default=None
        )
        measured = [setting for setting, x in known.items() if not math.isnan(x)]
        edges = () if best is None else _missing_neighbors(best, measured)
        if len(known) < len(tried):
            return Descent(tuple(tried), False, best, edges)
        failed = len(measured) < len(tried)
        wanted = [] if best is None and failed else _next_settings(tried, best, least)
        wanted = wanted[: most - len(tried)]
        if not wanted:
            return Descent(tuple(tried), True, best, edges)
        tried += wanted


def descend_equally(
    losses: Mapping[str, LossOf], starts: Mapping[str, Setting], least: int, most: int
) -> dict[str, Descent]:
    """Return the searches of several optimizers, which try equal numbers of settings at the end.

    None has ended before all have, since a longer one makes the others longer.
    """
    while True:
        found = {name: descend(loss, starts[name], least, most) for name, loss in losses.items()}
        if not all(search.ended for search in found.values()):
            return {name: replace(search, ended=False) for name, search in found.items()}
        longest = max(len(search.tried) for search in found.values())
        if longest <= least:
            return found
        least = longest


def _missing_neighbors(best: Setting, tried: list[Setting]) -> tuple[tuple[int, int], ...]:
    return tuple(
        (axis, side)
        for axis in range(len(best))
        for side in (-1, 1)
        if _moved(best, axis, side) not in tried
    )


def _moved(setting: Setting, axis: int, by: int) -> Setting:
    return (*setting[:axis], setting[axis] + by, *setting[axis + 1 :])


def _next_settings(tried: list[Setting], best: Setting | None, least: int) -> list[Setting]:
    """Return the settings to try next, none if the search has ended."""
    if best is None:  # every setting diverged: lower all keys
        return [tuple(min(axis) - 1 for axis in zip(*tried, strict=True))]
    if missing := _missing_neighbors(best, tried):
        return [_moved(best, axis, side) for axis, side in missing if axis == missing[0][0]]
    return [_nearest_untried(tried, best)] if len(tried) < least else []


def _nearest_untried(tried: list[Setting], best: Setting) -> Setting:
    axes = len(best)
    reach = next(n for n in itertools.count(1) if (2 * n + 1) ** axes > len(tried))
    shifts = itertools.product(range(-reach, reach + 1), repeat=axes)
    near = sorted(shifts, key=lambda shift: (sum(x * x for x in shift), shift))
    around = (tuple(map(sum, zip(best, shift, strict=True))) for shift in near)
    return next(setting for setting in around if setting not in tried)
