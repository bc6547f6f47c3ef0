"""Judges whether two trajectories differ by rounding alone.

There is no fixed tolerance. Rounding is measured on reordered runs, which take the same steps in
one process with sums in other orders (`muonscale.lab.verify.reordered_run`). A parameter may differ
by `LIMIT` times the largest of

- its difference in any reordered run;
- the median of that difference over the parameters of its group, in units of their sizes, since the
  few sums of one small parameter may happen to round the same way;
- an ulp of its size, and of the numbers that it is stored in.

AdamW divides a gradient by its own magnitude. Where the true gradient is nothing but rounding, as
that of a key bias is, the update is as large as any other and has no certain sign. A reordered run
has the same uncertainty in the same elements, so the limit follows; an element that happens to
round the same way in one reordered run does not do so in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from muonscale.lab.verify.trajectory import GatheredTensors, Trajectory, largest_magnitude

KindT = Literal["losses", "gradients", "weights"]

LIMIT = 30.0
"""The largest accepted difference, in units of the expected rounding.

Measured in float32: right layouts reach 3 in 60 runs and have reached 6, broken ones exceed 2,000
(docs/parallel.md, "Checking a layout"). With the first reordered run alone a right one has reached
87.
"""

FLOAT32_ULP = torch.finfo(torch.float32).eps
"""Losses and weights are stored in float32."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryDifference:
    """The difference of one quantity between both trajectories."""

    name: str
    """The name of a parameter, or `step 1`."""
    group: str
    """The optimizer's group."""
    difference: float
    """Largest difference of an element, between the layout and one process or two of its ranks."""
    reordered: float
    """Largest difference of an element between one process and its reordered runs."""
    rounding: float
    """The expected rounding."""

    @property
    def ratio(self) -> float:
        """The difference in units of the expected rounding; infinity if it is not finite."""
        if math.isinf(self.difference) or self.rounding == 0:
            return math.inf if self.difference else 0.0
        return self.difference / self.rounding

    @property
    def within(self) -> bool:
        """Whether rounding explains the difference."""
        return self.ratio <= LIMIT


@dataclass(frozen=True)
class LayoutComparison:
    """A layout compared with one process."""

    losses: tuple[TrajectoryDifference, ...]
    gradients: tuple[TrajectoryDifference, ...]
    weights: tuple[TrajectoryDifference, ...]

    @property
    def same(self) -> bool:
        """Whether rounding explains all differences."""
        return self.worst[1].within

    @property
    def worst(self) -> tuple[KindT, TrajectoryDifference]:
        """The difference with the largest ratio, after its kind."""
        kinds: tuple[KindT, ...] = ("losses", "gradients", "weights")
        rows = [(kind, row) for kind in kinds for row in getattr(self, kind)]
        return max(rows, key=lambda pair: pair[1].ratio)


def compare(
    one: Trajectory, reordered: Sequence[Trajectory], other: Trajectory, precision: torch.dtype
) -> LayoutComparison:
    """Compare a trajectory with that of one process.

    Args:
        one: the trajectory in one process.
        reordered: the same with sums in other orders.
        other: the trajectory in the layout.
        precision: dtype of the forward and backward passes.
    """
    ulp = torch.finfo(precision).eps
    steps = [f"step {number}" for number in range(1, len(one.losses) + 1)]

    def loss_differences(other: Trajectory) -> dict[str, float]:
        pairs = zip(steps, one.losses, other.losses, strict=True)
        return {name: gap if math.isfinite(gap := abs(a - b)) else math.inf for name, a, b in pairs}

    losses = dict(zip(steps, map(abs, one.losses), strict=True))
    gradients = {n: largest_magnitude(values) for n, values in one.gradients.values.items()}
    moved = {name: one.moved[name] for name in one.weights.values}
    return LayoutComparison(
        _judge(
            loss_differences(other),
            [loss_differences(run) for run in reordered],
            losses,
            {name: ulp * size for name, size in losses.items()},
            dict.fromkeys(steps, "loss"),
        ),
        _judge(
            _differences(one.gradients, other.gradients),
            [_differences(one.gradients, run.gradients) for run in reordered],
            gradients,
            {name: ulp * size for name, size in gradients.items()},
            one.groups,
        ),
        _judge(
            _differences(one.weights, other.weights),
            [_differences(one.weights, run.weights) for run in reordered],
            moved,
            {
                name: ulp * moved[name] + FLOAT32_ULP * largest_magnitude(weight)
                for name, weight in one.weights.values.items()
            },
            one.groups,
        ),
    )


def _judge(
    differences: Mapping[str, float],
    reordered: Sequence[Mapping[str, float]],
    sizes: Mapping[str, float],
    floors: Mapping[str, float],
    groups: Mapping[str, str],
) -> tuple[TrajectoryDifference, ...]:
    own = {name: max(run[name] for run in reordered) for name in differences}
    relative: dict[str, list[float]] = {}
    for name, size in sizes.items():
        if size:
            relative.setdefault(groups[name], []).append(own[name] / size)
    shares = {group: median(values) for group, values in relative.items()}
    return tuple(
        TrajectoryDifference(
            name=name,
            group=groups[name],
            difference=difference,
            reordered=own[name],
            rounding=max(own[name], shares.get(groups[name], 0.0) * sizes[name], floors[name]),
        )
        for name, difference in differences.items()
    )


def _differences(one: GatheredTensors, other: GatheredTensors) -> dict[str, float]:
    """Return the largest difference of every parameter, between runs and between ranks of one."""
    return {
        name: max(
            largest_magnitude(values.double() - other.values[name].double()),
            other.rank_differences[name],
        )
        for name, values in one.values.items()
    }
