"""The runs of a ladder: the settings that were tried on a rung, and the runs that measure it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from muonscale.lab.estimate.run_cost import RunCost


class Setting(NamedTuple):
    """Learning rate and batch of a rung."""

    lr: float
    batch: int | None
    """Tokens of a step; None for the recipe's."""


@dataclass(frozen=True)
class LadderSearch:
    """The settings that were tried on a rung."""

    losses: Mapping[Setting, Mapping[int, float]]
    """Losses by setting and seed; infinite where a run diverged."""
    ended: bool
    """Whether all runs of the search have ended."""

    @property
    def best(self) -> Setting | None:
        """The setting with the lowest mean loss, of those with most seeds."""
        most = max((len(each) for each in self.losses.values()), default=0)
        means = {
            setting: statistics.fmean(each.values())
            for setting, each in self.losses.items()
            if each and len(each) == most
        }
        finite = {setting: mean for setting, mean in means.items() if math.isfinite(mean)}
        return min(finite, key=lambda setting: finite[setting], default=None)

    @property
    def edges(self) -> list[str]:
        """Parts of the best setting that are the lowest or highest tried, such as `lr low`."""
        if (best := self.best) is None:
            return []
        found = []
        for name in Setting._fields:
            values = sorted({getattr(s, name) for s in self.losses if getattr(s, name) is not None})
            value = getattr(best, name)
            if len(values) > 1 and value in (values[0], values[-1]):
                found.append(f"{name} {'low' if value == values[0] else 'high'}")
        return found


@dataclass(frozen=True)
class MeasuredRung:
    """Runs of one optimizer, on one rung, of one length."""

    variant: str
    rung: str
    setting: Setting
    main: bool
    """Whether it has the rung's own length, which the law of C uses."""
    cost: RunCost
    losses: Mapping[int, float]
    """Losses by seed; infinite where a run diverged."""
    search: LadderSearch
    """The search of the optimizer on the rung."""
