"""One step of one rule, on the parameters that are whole on this rank and on those that are shared.

The way of a parameter is described in docs/concepts/life-of-a-step.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muonscale.optim.distributed.consensus import total
from muonscale.optim.distributed.dtensor import part_here
from muonscale.optim.distributed.rank_group import RankGroup, StepTensors
from muonscale.optim.distributed.zero1 import PartitionedTensor
from muonscale.optim.matrices.batches import MatrixBatches
from muonscale.optim.matrices.local import LocalMatrices
from muonscale.optim.matrices.sharding import read_piece
from muonscale.optim.rules.base import (
    Rule,
    apply_constrained_,
    apply_updates_,
    batch_update,
    constrained_sums,
    matrix_updates,
    rate_of,
    rule_of,
)
from muonscale.optim.rules.master_weights import Rounding, Weights, rounding_key
from muonscale.optim.rules.step_inputs import (
    Group,
    ParamStep,
    batches,
    by_group,
    by_group_and_device,
)


@dataclass(frozen=True)
class StepTally:
    """What rules on matrices did in one step, on all ranks together."""

    matrices: int = 0
    """Logical matrices updated."""
    squares: tuple[Tensor, ...] = ()
    """0-D, on the device: they add up to the sum of squares of all updates."""
    elements: int = 0
    """Number of elements of these updates."""

    @property
    def update_rms(self) -> Tensor | None:
        """0-D, on the device; None if no rule on matrices had a parameter."""
        if not self.squares:
            return None
        sums = torch.stack([s.to(self.squares[0].device) for s in self.squares]).sum()
        return (sums / max(1, self.elements)).sqrt()

    def __add__(self, other: StepTally) -> StepTally:
        return StepTally(
            self.matrices + other.matrices,
            self.squares + other.squares,
            self.elements + other.elements,
        )


def step_elements_(rule: Rule, items: list[ParamStep], mask: Tensor | None) -> StepTally:
    """Step an elementwise rule on the part of each parameter that is on this rank."""
    for group, part in by_group_and_device(items):
        rule.step_(
            _weights(group, part),
            [item.gradient for item in part],
            _elementwise(rule, group, [item.state for item in part]),
            group,
            lr=float(group["lr"]),
            rate=rate_of(group),
            mask=_near(mask, part),
        )
    return StepTally()


def step_matrices_(
    rule: Rule, items: list[ParamStep], mask: Tensor | None, compile: bool | str
) -> StepTally:
    """Step a rule on matrices, in batches of parameters that are whole on this rank."""
    tally = StepTally()
    of_step = mask
    for update, batch in batches(items):
        mask = _near(of_step, batch)
        directions: list[Tensor] = []
        for group, part in by_group(batch):
            state = _elementwise(rule, group, [item.state for item in part])
            directions += rule.direction_(state, [i.gradient for i in part], group, mask)
        updates = matrix_updates(
            directions,
            MatrixBatches([tuple(i.parameter.shape) for i in batch], [i.matrices for i in batch]),
            functools.partial(batch_update, update, compile=compile),
            rows={key: [item.state[key] for item in batch] for key in update.row_states},
            elements={key: [i.state[key] for i in batch] for key in update.element_states},
            mask=mask,
        )
        _apply_(batch, updates.tensors, mask)
        elements = sum(item.parameter.numel() for item in batch)
        tally += StepTally(updates.matrices, tuple(updates.squares), elements)
    return tally


def step_shared_(
    rule: Rule, rank_group: RankGroup, items: list[ParamStep], mask: Tensor | None
) -> StepTally:
    """Step parameters whose matrices or state are on several ranks; a collective of the rank group.

    Every update is applied as soon as it has arrived, or, if a constraint needs sums over matrices
    that are divided among ranks, after all have arrived.

    Args:
        rule: rule of the parameters.
        rank_group: rank group of the parameters. Others in it may have no gradient.
        items: the same on all ranks of the group.
        mask: 0-D bool on the device; false leaves parameters and state as they are.
    """
    mask = _near(mask, items)
    by_name = {item.name: item for item in items}
    tensors = _step_tensors(rule, items, mask)
    square = torch.zeros((), device=items[0].parameter.device)
    later = [i for i in items if rule.constraint(i.group) and part_here(i.sharding) is not None]
    waiting = {item.name for item in later}
    for names in rank_group.updates(tensors, by_name, mask):
        complete = [by_name[name] for name in names]
        if rule.on_matrices:
            for item in complete:
                assert item.sharding is not None
                own = torch.linalg.vector_norm(tensors.updates[item.name]).square()
                square += own.float() / item.sharding.copies
        complete = [item for item in complete if item.name not in waiting]
        updates = [tensors.updates[i.name].view(i.parameter.shape) for i in complete]
        _apply_(complete, updates, mask)
        updates.clear()  # or they would live on while the next round is worked on
        for item in complete:
            del tensors.updates[item.name]
    if later:
        updates = [tensors.updates[i.name].view(i.parameter.shape) for i in later]
        _apply_(later, updates, mask, rank_group)
    if not rule.on_matrices:
        return StepTally()
    elements = sum(math.prod(i.sharding.shape) for i in items if i.sharding is not None)
    return StepTally(
        rank_group.count_matrices(by_name), (total(square, rank_group.group),), elements
    )


def _near(mask: Tensor | None, items: Sequence[ParamStep]) -> Tensor | None:
    """Return `mask` on the device of `items`, which all have the same."""
    return None if mask is None else mask.to(items[0].parameter.device)


def _elementwise(rule: Rule, group: Group, states: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the elementwise state by name, and counts as numbers."""
    found: dict[str, list[Any]] = {}
    for tensor in rule.state(group):
        if tensor.per == "element":
            found[tensor.name] = [state[tensor.name] for state in states]
        elif tensor.per == "parameter":
            counts = torch.stack([state[tensor.name] for state in states])
            found[tensor.name] = counts.int().tolist()
    return found


class _Arrivals(dict[str, Tensor]):
    """Where updates arrive, allocated when the first piece is there."""

    def __init__(self, items: list[ParamStep], key: str) -> None:
        super().__init__()
        self._items = {item.name: item for item in items}
        self._key = key

    def __missing__(self, name: str) -> Tensor:
        item = self._items[name]
        state = item.state[self._key]
        shape = item.parameter.shape
        if isinstance(state, PartitionedTensor):
            shape = state.sharding.shape
        self[name] = torch.empty(shape, dtype=state.dtype, device=state.device)
        return self[name]


def _step_tensors(rule: Rule, items: list[ParamStep], mask: Tensor | None) -> StepTensors:
    """Make the directions of what of the state is on this rank."""
    directions: dict[str, Tensor] = {}
    whole: dict[tuple[str, int], Tensor] = {}
    first = rule.state(items[0].group)[0].name
    updates = _Arrivals(items, first)
    for group, part in by_group(items):
        keys = [
            tensor.name for tensor in rule.state(group) if tensor.per in ("element", "parameter")
        ]
        here = [(item, *piece) for item in part for piece in _pieces_here(item, first, keys)]
        if not here:  # this rank owns none of them
            continue
        state = _elementwise(rule, group, [values for _, _, values, _ in here])
        new = rule.direction_(state, [G for *_, G in here], group, mask)
        for (item, number, values, _), direction in zip(here, new, strict=True):
            if number is not None:
                whole[item.name, number] = direction
                continue
            directions[item.name] = direction
            own = all(direction is not value for value in values.values())
            if own and direction.is_contiguous():  # pieces of a kernel are written into its matrix
                # A piece has left before its update arrives, so the update may take its place.
                updates[item.name] = direction
    rows = {
        tensor.name: {i.name: i.state[tensor.name] for i in items if tensor.name in i.state}
        for group, _ in by_group(items)
        for tensor in rule.state(group)
        if tensor.per in ("row", "matrix")
    }
    whole_rows = {
        key: {
            (name, number): part
            for name, state in states.items()
            if isinstance(state, PartitionedTensor)
            for number, part in state.parts.items()
        }
        for key, states in rows.items()
    }
    return StepTensors(
        directions=directions, updates=updates, rows=rows, whole=whole, whole_rows=whole_rows
    )


def _pieces_here(
    item: ParamStep, first: str, keys: list[str]
) -> Iterator[tuple[int | None, dict[str, Tensor], Tensor]]:
    """Yield (number of the matrix or None, state by name, gradient) of what is on this rank."""
    state = item.state[first]
    if not isinstance(state, PartitionedTensor):
        yield None, {key: item.state[key] for key in keys}, item.gradient
        return
    gradient = item.gradient.reshape(state.sharding.shape)
    for piece, _ in state.iter_pieces():
        values = {key: _part_of(item.state[key], piece.matrix) for key in keys}
        yield piece.matrix, values, read_piece(gradient, state.sharding.matrices, piece)


def _part_of(value: Tensor, number: int) -> Tensor:
    return value.parts[number] if isinstance(value, PartitionedTensor) else value


def _apply_(
    batch: list[ParamStep],
    updates: list[Tensor],
    mask: Tensor | None,
    rank_group: RankGroup | None = None,
) -> None:
    """Apply updates; with a rank group, a collective for parameters that it divides."""
    left = iter(updates)
    for group, part in by_group(batch):
        W, U = _weights(group, part), [next(left) for _ in part]
        rate, cautious = rate_of(group), group["cautious_decay"]
        constraint = rule_of(group).constraint(group)
        if constraint is None:
            apply_updates_(W, U, lr=float(group["lr"]), rate=rate, cautious=cautious, mask=mask)
            continue
        matrices = [_local_matrices(item) for item in part]
        sums = constrained_sums(W, U, matrices, rate=rate, cautious=cautious)
        if rank_group is not None:
            copies = [i.sharding.copies for i in part if i.sharding is not None]
            counts = torch.tensor([own.count for own in matrices])
            sums /= torch.tensor(copies).repeat_interleave(counts).to(sums)
            sums = total(sums, rank_group.group)
        apply_constrained_(W, U, matrices, sums, constraint, group, mask)


def _local_matrices(item: ParamStep) -> LocalMatrices:
    shape = item.parameter.shape if item.sharding is None else item.sharding.shape
    return LocalMatrices(tuple(shape), item.matrices, part_here(item.sharding))


def _weights(group: Group, part: list[ParamStep]) -> Weights:
    stored = [item.parameter for item in part]
    if group["master"] == "float32":
        return Weights(stored=stored, masters=[item.state.get("master") for item in part])
    if group["master"] == "stochastic":
        return Weights(stored=stored, roundings=[_rounding(item) for item in part])
    return Weights(stored=stored)


def _rounding(item: ParamStep) -> Rounding | None:
    if "rounding_step" not in item.state:
        return None
    step = int(item.state["rounding_step"])
    key = rounding_key(item.group["rounding_seed"], item.name, step)
    return Rounding(key, part_here(item.sharding))
