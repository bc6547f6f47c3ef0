"""Curves of loss against a hyper-parameter: the best point, and whether it lies at the edge."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

EdgeT = Literal["low", "high"]


@dataclass(frozen=True)
class Point:
    """One value of the hyper-parameter."""

    value: float
    losses: Mapping[int, float]
    """Held-out loss by seed of the runs that ended; infinite where a run diverged."""

    @property
    def mean(self) -> float:
        """Over seeds; infinite if a run diverged, NaN without any."""
        return statistics.fmean(self.losses.values()) if self.losses else math.nan

    @property
    def finite(self) -> bool:
        """Whether runs ended here and all of them have a loss."""
        return math.isfinite(self.mean)


@dataclass(frozen=True)
class Sweep:
    """Values in rising order."""

    points: tuple[Point, ...]

    @property
    def best(self) -> int | None:
        """Number of the point with the lowest mean loss, among those with most seeds."""
        most = max((len(point.losses) for point in self.points), default=0)
        usable = [
            (point.mean, number)
            for number, point in enumerate(self.points)
            if point.finite and len(point.losses) == most
        ]
        return min(usable)[1] if usable else None

    @property
    def edge(self) -> EdgeT | None:
        """Where the best point is at the end of what was tried: a lower loss may lie beyond."""
        if self.best is None or len(self.points) == 1:
            return None
        return {0: "low", len(self.points) - 1: "high"}.get(self.best)  # type: ignore[return-value]

    @property
    def around(self) -> tuple[Point, ...]:
        """The best point and its neighbours, where they have losses."""
        if self.best is None:
            return ()
        near = self.points[max(0, self.best - 1) : self.best + 2]
        return tuple(point for point in near if point.finite)
