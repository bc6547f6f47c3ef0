"""Whether two trajectories differ by rounding alone; pure.

No tolerance is written down here. What rounding comes to is measured: on the twins of a run, which
are the same steps in one process with the sums in other orders (`muonscale.lab.verify.reordered_run`). A
parameter may differ by `LIMIT` times the largest of

- what it differs by in any of the twins;
- the median of that over the parameters of its group, in units of their sizes, since the few sums
  of one small parameter may happen to round alike;
- an ulp of its size, and of the numbers that it is stored in.

AdamW divides a gradient by its own magnitude: where the true gradient is nothing but rounding, as
that of a key bias is, the update is as large as any other and of no certain sign. The twins have
the same elements with the same uncertainty, so the limit follows; an element that happens to round
alike in one of them does not do so in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from muonscale.lab.verify.trajectory import Trajectory, Whole

KindT = Literal["losses", "gradients", "weights"]

LIMIT = 30.0
"""Times the expected rounding that a difference may be.

Measured in float32: right layouts reach 3 in 60 runs and have reached 6, broken ones exceed 2,000
(docs/parallel.md, "Checking a layout"). With the first twin alone a right one has reached 87.
"""

FLOAT32_ULP = torch.finfo(torch.float32).eps
"""Of the numbers that losses and weights are stored in."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity of both trajectories."""

    name: str
    """Of a parameter, or `step 1`."""
    group: str
    """The optimizer's group."""
    difference: float
    """Largest difference of an element, between the layout and one process or two of its ranks."""
    twin: float
    """The same between one process and its twins."""
    rounding: float
    """What rounding is expected to come to."""

    @property
    def ratio(self) -> float:
        """Difference in units of the expected rounding, infinity if that is not a number."""
        if math.isinf(self.difference) or self.rounding == 0:
            return math.inf if self.difference else 0.0
        return self.difference / self.rounding

    @property
    def within(self) -> bool:
        """Whether rounding explains the difference."""
        return self.ratio <= LIMIT


@dataclass(frozen=True)
class Comparison:
    """A layout against one process."""

    losses: tuple[Row, ...]
    gradients: tuple[Row, ...]
    weights: tuple[Row, ...]

    @property
    def same(self) -> bool:
        """Whether rounding explains all differences."""
        return self.worst[1].within

    @property
    def worst(self) -> tuple[KindT, Row]:
        """The row with the largest ratio, and what it is of."""
        kinds: tuple[KindT, ...] = ("losses", "gradients", "weights")
        rows = [(kind, row) for kind in kinds for row in getattr(self, kind)]
        return max(rows, key=lambda pair: pair[1].ratio)


def compare(
    one: Trajectory, twins: Sequence[Trajectory], other: Trajectory, precision: torch.dtype
) -> Comparison:
    """Compare a trajectory with that of one process.

    Args:
        one: in one process.
        twins: the same with sums in other orders.
        other: in the layout.
        precision: of the forward and backward passes.
    """
    ulp = torch.finfo(precision).eps
    weights = one.weights.values
    moved = {name: one.moved[name] for name in weights}
    stored = {name: FLOAT32_ULP * _size(weight) for name, weight in weights.items()}
    floors = {name: ulp * moved[name] + stored[name] for name in weights}
    sizes = {name: _size(gradient) for name, gradient in one.gradients.values.items()}
    return Comparison(
        _losses(one, twins, other, ulp),
        _rows(
            _differences(one.gradients, other.gradients),
            [_differences(one.gradients, twin.gradients) for twin in twins],
            sizes,
            {name: ulp * size for name, size in sizes.items()},
            one.groups,
        ),
        _rows(
            _differences(one.weights, other.weights),
            [_differences(one.weights, twin.weights) for twin in twins],
            moved,
            floors,
            one.groups,
        ),
    )


def _losses(
    one: Trajectory, twins: Sequence[Trajectory], other: Trajectory, ulp: float
) -> tuple[Row, ...]:
    names = [f"step {number}" for number in range(1, len(one.losses) + 1)]
    sizes = dict(zip(names, map(abs, one.losses), strict=True))

    def apart(trajectory: Trajectory) -> dict[str, float]:
        pairs = zip(names, one.losses, trajectory.losses, strict=True)
        return {name: _finite(abs(a - b)) for name, a, b in pairs}

    floors = {name: ulp * size for name, size in sizes.items()}
    groups = dict.fromkeys(names, "loss")
    return _rows(apart(other), [apart(twin) for twin in twins], sizes, floors, groups)


def _rows(
    differences: Mapping[str, float],
    twins: Sequence[Mapping[str, float]],
    sizes: Mapping[str, float],
    floors: Mapping[str, float],
    groups: Mapping[str, str],
) -> tuple[Row, ...]:
    own = {name: max(twin[name] for twin in twins) for name in differences}
    relative: dict[str, list[float]] = {}
    for name, size in sizes.items():
        if size:
            relative.setdefault(groups[name], []).append(own[name] / size)
    shares = {group: median(values) for group, values in relative.items()}
    return tuple(
        Row(
            name=name,
            group=groups[name],
            difference=difference,
            twin=own[name],
            rounding=max(own[name], shares.get(groups[name], 0.0) * sizes[name], floors[name]),
        )
        for name, difference in differences.items()
    )


def _differences(one: Whole, other: Whole) -> dict[str, float]:
    """Return the largest difference of every parameter, between runs and between ranks of one."""
    return {
        name: max(_size(values.double() - other.values[name].double()), other.apart[name])
        for name, values in one.values.items()
    }


def _size(tensor: Tensor) -> float:
    return _finite(float(tensor.abs().max())) if tensor.numel() else 0.0


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
