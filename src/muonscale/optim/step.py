"""One step of one rule, on the parameters that are whole on this rank and on those that are shared.

The way of a parameter is described in docs/concepts/life-of-a-step.md.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from muonscale.optim.distributed.consensus import total
from muonscale.optim.distributed.dtensor import part_here
from muonscale.optim.distributed.rank_group import RankGroup, StepTensors
from muonscale.optim.distributed.zero1 import PartitionedTensor
from muonscale.optim.matrices.batches import MatrixBatches
from muonscale.optim.matrices.local import LocalMatrices
from muonscale.optim.matrices.sharding import Piece, pieces, read_piece, write_piece_
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
from muonscale.optim.rules.moments import write_
from muonscale.optim.rules.row_magnitude import (
    LENGTH,
    ROW_STATES,
    STEP,
    RowStep,
    apply_rows_,
    direction_gradients_,
    factors,
    gradient_sums,
    step_magnitudes,
    update_sums,
)
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
    for update, whole in batches(items):
        near = _near(mask, whole)
        batch, rows = _with_row_steps(whole, near)
        directions: list[Tensor] = []
        for group, part in by_group(batch):
            state = _elementwise(rule, group, _spread(rule, group, part))
            directions += rule.direction_(state, [i.gradient for i in part], group, near)
        updates = matrix_updates(
            directions,
            MatrixBatches([tuple(i.parameter.shape) for i in batch], [i.matrices for i in batch]),
            functools.partial(batch_update, update, compile=compile),
            rows={key: [item.state[key] for item in batch] for key in update.row_states},
            elements={key: [i.state[key] for i in batch] for key in update.element_states},
            mask=near,
        )
        _apply_(batch, updates.tensors, near, rows)
        elements = sum(item.parameter.numel() for item in batch)
        tally += StepTally(updates.matrices, tuple(updates.squares), elements)
    return tally


def step_shared_(
    rule: Rule, rank_group: RankGroup, items: list[ParamStep], mask: Tensor | None
) -> StepTally:
    """Step parameters whose matrices or state are on several ranks; a collective of the rank group.

    In a step on blocks sharded parameters are updated without a message. Otherwise every update is
    applied as soon as it has arrived, or, if a constraint needs sums over matrices
    that are divided among ranks, after all have arrived.

    Args:
        rule: rule of the parameters.
        rank_group: rank group of the parameters. Others in it may have no gradient.
        items: the same on all ranks of the group.
        mask: 0-D bool on the device; false leaves parameters and state as they are.
    """
    mask = _near(mask, items)
    items, rows = _with_row_steps(items, mask, rank_group)
    alone = [i for i in items if part_here(i.sharding) and rule.blockwise(i.state, i.group)]
    by_name = {item.name: item for item in items}
    square = torch.zeros((), device=items[0].parameter.device)
    if alone:
        updates = _block_updates(rule, rank_group, alone, mask)
        for item, update in zip(alone, updates, strict=True):
            square += _square(item, update)
        _apply_(alone, updates, mask, rows, rank_group)
        blockwise = {item.name for item in alone}
        items = [item for item in items if item.name not in blockwise]
    if items:
        square += _step_whole_(rule, rank_group, items, mask, rows)
    if not rule.on_matrices:
        return StepTally()
    elements = sum(math.prod(i.sharding.shape) for i in by_name.values() if i.sharding is not None)
    return StepTally(
        rank_group.count_matrices(by_name), (total(square, rank_group.group),), elements
    )


def _square(item: ParamStep, update: Tensor) -> Tensor:
    """Return this rank's share of the sum of squares of an update."""
    assert item.sharding is not None
    return torch.linalg.vector_norm(update).square().float() / item.sharding.copies


def _step_whole_(
    rule: Rule,
    rank_group: RankGroup,
    items: list[ParamStep],
    mask: Tensor | None,
    rows: Mapping[str, RowStep],
) -> Tensor:
    """Step parameters by whole matrices, and return this rank's share of the sum of squares."""
    by_name = {item.name: item for item in items}
    tensors = _step_tensors(rule, items, mask)
    square = torch.zeros((), device=items[0].parameter.device)
    later = [i for i in items if rule.constraint(i.group) and part_here(i.sharding) is not None]
    waiting = {item.name for item in later}
    for names in rank_group.updates(tensors, by_name, mask):
        complete = [by_name[name] for name in names]
        if rule.on_matrices:
            for item in complete:
                square += _square(item, tensors.updates[item.name])
        complete = [item for item in complete if item.name not in waiting]
        updates = [tensors.updates[i.name].view(i.parameter.shape) for i in complete]
        _apply_(complete, updates, mask, rows)
        updates.clear()  # or they would live on while the next round is worked on
        for item in complete:
            del tensors.updates[item.name]
    if later:
        updates = [tensors.updates[i.name].view(i.parameter.shape) for i in later]
        _apply_(later, updates, mask, rows, rank_group)
    return square


def _block_updates(
    rule: Rule, rank_group: RankGroup, items: list[ParamStep], mask: Tensor | None
) -> list[Tensor]:
    """Return the updates of what this rank holds of each matrix, each piece by itself."""
    directions: list[Tensor] = []
    for group, part in by_group(items):
        state = _elementwise(rule, group, [item.state for item in part])
        directions += rule.direction_(state, [item.gradient for item in part], group, mask)
    updates = [torch.zeros_like(direction) for direction in directions]
    similar: defaultdict[Any, list[tuple[int, Piece]]] = defaultdict(list)
    for number, item in enumerate(items):
        here = part_here(item.sharding)
        assert here is not None
        for piece in pieces(*here):
            key = rule.matrix_update(item.group), piece.shape, directions[number].dtype
            similar[key].append((number, piece))
    for (update, shape, _), blocks in similar.items():
        assert update is not None
        N_NMK = torch.stack([read_piece(directions[n], items[n].matrices, p) for n, p in blocks])
        U_NMK, _ = rank_group.find_update(shape, update)(N_NMK, {})
        for (n, piece), U_MK in zip(blocks, U_NMK.unbind(), strict=True):
            write_piece_(updates[n], items[n].matrices, piece, U_MK)
    return updates


def _near(mask: Tensor | None, items: Sequence[ParamStep]) -> Tensor | None:
    """Return `mask` on the device of `items`, which all have the same."""
    return None if mask is None else mask.to(items[0].parameter.device)


def _elementwise(rule: Rule, group: Group, states: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the elementwise state by name, and counts as numbers."""
    found: dict[str, list[Any]] = {}
    for tensor in rule.state(group):
        if tensor.per == "element" or tensor.spread:
            found[tensor.name] = [state[tensor.name] for state in states]
        elif tensor.per == "parameter":
            counts = torch.stack([state[tensor.name] for state in states])
            found[tensor.name] = counts.int().tolist()
    return found


def _spread(rule: Rule, group: Group, part: list[ParamStep]) -> list[Mapping[str, Any]]:
    """Return the states, with per-row state that the direction reads broadcast to the gradients."""
    names = [tensor.name for tensor in rule.state(group) if tensor.spread]
    if not names:
        return [item.state for item in part]
    states: list[Mapping[str, Any]] = []
    for item in part:
        # The parts of partitioned state are [out, 1].
        if isinstance(item.state[names[0]], PartitionedTensor):
            states.append(item.state)
            continue
        own = _local_matrices(item)
        spread = {name: own.spread(item.state[name], item.gradient) for name in names}
        states.append(item.state | spread)
    return states


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
            tensor.name
            for tensor in rule.state(group)
            if tensor.per in ("element", "parameter") or tensor.spread
        ]
        here = [
            (item, *piece)
            for item, values in zip(part, _spread(rule, group, part), strict=True)
            for piece in _pieces_here(item, values, first, keys)
        ]
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
    item: ParamStep, values: Mapping[str, Any], first: str, keys: list[str]
) -> Iterator[tuple[int | None, dict[str, Tensor], Tensor]]:
    """Yield (number of the matrix or None, state by name, gradient) of what is on this rank."""
    state = item.state[first]
    if not isinstance(state, PartitionedTensor):
        yield None, {key: values[key] for key in keys}, item.gradient
        return
    gradient = item.gradient.reshape(state.sharding.shape)
    for piece, _ in state.iter_pieces():
        own = {key: _part_of(values[key], piece.matrix) for key in keys}
        yield piece.matrix, own, read_piece(gradient, state.sharding.matrices, piece)


def _part_of(value: Tensor, number: int) -> Tensor:
    return value.parts[number] if isinstance(value, PartitionedTensor) else value


def _apply_(
    batch: list[ParamStep],
    updates: list[Tensor],
    mask: Tensor | None,
    rows: Mapping[str, RowStep],
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
        if constraint.by_rows:
            sums = _over_ranks(update_sums(W, U, matrices), part, matrices, rank_group)
            step = RowStep.cat([rows[item.name] for item in part])
            keep, move, lengths = factors(sums, step, float(group["lr"]))
            apply_rows_(W, U, matrices, keep, move, rate=rate, cautious=cautious, mask=mask)
            _write_rows_(part, matrices, {LENGTH: lengths}, mask)
            continue
        sums = constrained_sums(W, U, matrices, rate=rate, cautious=cautious)
        if rank_group is not None:
            sums = _summed(sums, part, [own.count for own in matrices], rank_group)
        apply_constrained_(W, U, matrices, sums, constraint, group, mask)


def _with_row_steps(
    items: list[ParamStep], mask: Tensor | None, rank_group: RankGroup | None = None
) -> tuple[list[ParamStep], dict[str, RowStep]]:
    """Step the magnitudes of rows; a collective of the rank group if it divides rows.

    Returns:
        The items, with the gradient of the directions where their constraint is by rows, and what
        the rest of the step needs, by name.
    """
    new: list[ParamStep] = []
    steps: dict[str, RowStep] = {}
    for group, part in by_group(items):
        constraint = rule_of(group).constraint(group)
        if constraint is None or not constraint.by_rows:
            new += part
            continue
        W, matrices = _weights(group, part), [_local_matrices(item) for item in part]
        G = [item.gradient.to(item.state[LENGTH].dtype, copy=True) for item in part]
        sums = _over_ranks(gradient_sums(W, G, matrices), part, matrices, rank_group)
        counts = _elementwise(rule_of(group), group, [item.state for item in part])[STEP]
        sums_of = sums.split([own.rows for own in matrices], dim=1)
        for item, own, g, of_item, count in zip(part, matrices, G, sums_of, counts, strict=True):
            state = {key: own.read_rows(item.state[key]) for key in ROW_STATES}
            step, values, a, b = step_magnitudes(of_item, state, group, count)
            _write_rows_([item], [own], values, mask)
            direction_gradients_(_weights(group, [item]), [g], [own], a, b)
            steps[item.name] = step
            new.append(replace(item, gradient=g))
    return new, steps


def _write_rows_(
    items: list[ParamStep],
    matrices: list[LocalMatrices],
    values: Mapping[str, Tensor],
    mask: Tensor | None,
) -> None:
    """Write state per row on this rank, of `[rows]` for all items together."""
    counts = [own.rows for own in matrices]
    for key, every in values.items():
        states = [item.state[key] for item in items]
        each = zip(matrices, every.split(counts), states, strict=True)
        new = [own.write_rows(rows, state) for own, rows, state in each]
        if mask is not None:  # a product would keep NaN
            new = [torch.where(mask, n, state) for n, state in zip(new, states, strict=True)]
        write_(states, new)


def _over_ranks(
    sums: Tensor,
    items: list[ParamStep],
    matrices: list[LocalMatrices],
    rank_group: RankGroup | None,
) -> Tensor:
    """Return sums over rows, over all ranks; only rows that are divided among ranks are sent."""
    numbers = [n for n, own in enumerate(matrices) if own.divides_rows]
    if rank_group is None or not numbers:
        return sums
    parts = list(sums.split([own.rows for own in matrices], dim=1))
    counts = [matrices[n].rows for n in numbers]
    divided = torch.cat([parts[n] for n in numbers], dim=1)
    whole = _summed(divided, [items[n] for n in numbers], counts, rank_group)
    for n, part in zip(numbers, whole.split(counts, dim=1), strict=True):
        parts[n] = part
    return torch.cat(parts, dim=1)


def _summed(
    sums: Tensor, items: list[ParamStep], counts: list[int], rank_group: RankGroup
) -> Tensor:
    """Return `[..., counts together]` over all ranks, where some ranks hold the same elements."""
    copies = [item.sharding.copies for item in items if item.sharding is not None]
    sums /= torch.tensor(copies).repeat_interleave(torch.tensor(counts)).to(sums)
    return total(sums, rank_group.group)


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
