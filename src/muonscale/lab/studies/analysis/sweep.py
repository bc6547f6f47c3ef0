"""Loss against a hyper-parameter: the best point, and whether it is at the edge."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from muonscale.lab.studies.study import Outcome, collect_losses

EdgeT = Literal["low", "high"]


@dataclass(frozen=True)
class Point:
    """One value of the hyper-parameter."""

    value: float
    losses: Mapping[int, float]
    """Validation loss by seed of the runs that ended; infinite where a run diverged."""

    @property
    def mean(self) -> float:
        """Mean over seeds; infinite if a run diverged, NaN without any."""
        return statistics.fmean(self.losses.values()) if self.losses else math.nan

    @property
    def finite(self) -> bool:
        """Whether runs have ended here and none diverged."""
        return math.isfinite(self.mean)

    def row(self, name: str) -> dict[str, Any]:
        """Return the point as plain values, the hyper-parameter under `name`."""
        losses = {str(seed): loss for seed, loss in self.losses.items()}
        return {name: self.value, "losses": losses, "mean": self.mean}


@dataclass(frozen=True)
class Sweep:
    """Points with rising values."""

    points: tuple[Point, ...]

    @property
    def best(self) -> int | None:
        """Index of the point with the lowest mean loss, among those with most seeds."""
        most = max((len(point.losses) for point in self.points), default=0)
        usable = [
            (point.mean, number)
            for number, point in enumerate(self.points)
            if point.finite and len(point.losses) == most
        ]
        return min(usable)[1] if usable else None

    @property
    def edge(self) -> EdgeT | None:
        """The end at which the best point is, if any: a lower loss may be beyond it."""
        if self.best is None or len(self.points) == 1:
            return None
        return "low" if self.best == 0 else "high" if self.best == len(self.points) - 1 else None

    @property
    def around(self) -> tuple[Point, ...]:
        """The best point and its neighbors, if they have losses."""
        if self.best is None:
            return ()
        near = self.points[max(0, self.best - 1) : self.best + 2]
        return tuple(point for point in near if point.finite)


def build_sweep(outcomes: Iterable[Outcome], key: str) -> Sweep:
    """Return the sweep of runs over one of their coordinates."""
    points: dict[float, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        points[float(outcome.run.coordinates[key])].append(outcome)
    return Sweep(tuple(Point(value, collect_losses(points[value])) for value in sorted(points)))
