"""One optimizer step on the parameters of each rule: from options and state to the pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from muonscale.optim.distributed.consensus import total
from muonscale.optim.distributed.dtensor import part_here
from muonscale.optim.distributed.rank_group import RankGroup, StepTensors
from muonscale.optim.distributed.zero1 import PartitionedTensor
from muonscale.optim.matrices.batches import MatrixBatches
from muonscale.optim.matrices.sharding import read_piece
from muonscale.optim.rules.adamw import adamw_step_, adamw_updates_
from muonscale.optim.rules.decay import decay_rate
from muonscale.optim.rules.master_weights import Rounding, Weights, rounding_key
from muonscale.optim.rules.muon import apply_updates_, momentum_step_, polar_updates
from muonscale.optim.rules.step_inputs import Group, ParamStep, batches, by_group
from muonscale.optim.state.state import ROW_STATE


@dataclass(frozen=True)
class MuonTally:
    """What the Muon rule did in one step, on all ranks together."""

    matrices: int
    """Logical matrices orthogonalised."""
    squares: list[Tensor]
    """0-D, on the device: they add up to the sum of squares of all updates."""
    elements: int
    """How many elements these have."""

    @property
    def update_rms(self) -> Tensor | None:
        """0-D, on the device; None if nothing was on Muon."""
        if not self.squares:
            return None
        total = torch.stack([s.to(self.squares[0].device) for s in self.squares]).sum()
        return (total / max(1, self.elements)).sqrt()

    def __add__(self, other: MuonTally) -> MuonTally:
        return MuonTally(
            self.matrices + other.matrices,
            self.squares + other.squares,
            self.elements + other.elements,
        )


def adamw_items_(items: list[ParamStep], mask: Tensor | None) -> None:
    """Write one AdamW step into the parameters and the state of `items`."""
    for group, part in by_group(items):
        adamw_step_(
            _weights(group, part),
            [i.gradient for i in part],
            [i.state["exp_avg"] for i in part],
            [i.state["exp_avg_sq"] for i in part],
            [int(i.state["step"]) for i in part],
            lr=float(group["lr"]),
            rate=decay_rate(group),
            cautious=group["cautious_decay"],
            betas=group["betas"],
            eps=group["eps"],
            mask=mask,
        )


def muon_items_(items: list[ParamStep], mask: Tensor | None, compile: bool | str) -> MuonTally:
    """Write one Muon step into the parameters and the state of `items`, all whole on this rank."""
    matrices = 0
    squares: list[Tensor] = []
    for polar, batch in batches(items):
        directions: list[Tensor] = []
        for group, part in by_group(batch):
            directions += momentum_step_(
                [i.state["momentum_buffer"] for i in part],
                [i.gradient for i in part],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                mask=mask,
            )
        stacks = MatrixBatches([tuple(i.parameter.shape) for i in batch], [i.layout for i in batch])
        rows = [i.state[ROW_STATE] for i in batch] if ROW_STATE in batch[0].state else None
        updates = polar_updates(directions, stacks, polar, V=rows, mask=mask, compile=compile)
        matrices += updates.matrices
        squares += updates.squares
        _apply(batch, updates.tensors, mask)
    return MuonTally(matrices, squares, sum(item.parameter.numel() for item in items))


def muon_domain_(domain: RankGroup, items: list[ParamStep], mask: Tensor | None) -> MuonTally:
    """Write one Muon step into what of `items` is on this rank. A collective of the domain.

    Args:
        domain: of `items`, and of others without a gradient.
        items: the same on all ranks of the domain.
        mask: see `commit_`.
    """
    cargo = _cargo(items, mask)
    square = torch.zeros((), device=items[0].parameter.device)
    for item, own_square in _updated(domain, items, cargo, mask):
        assert item.placing is not None
        square += own_square.float() / item.placing.copies
    squares = total(square, domain.group)
    elements = sum(math.prod(i.placing.shape) for i in items if i.placing is not None)
    return MuonTally(domain.matrices({i.name for i in items}), [squares], elements)


def _updated(
    domain: RankGroup, items: list[ParamStep], cargo: StepTensors, mask: Tensor | None
) -> Iterator[tuple[ParamStep, Tensor]]:
    """Apply the updates as they arrive, and yield the sums of their squares."""
    by_name = {item.name: item for item in items}
    for names in domain.updates(cargo, by_name):
        complete = [by_name[name] for name in names]
        updates = [cargo.updates[i.name].view(i.parameter.shape) for i in complete]
        _apply(complete, updates, mask)
        squares = [torch.linalg.vector_norm(update).square() for update in updates]
        updates.clear()  # or they would live on while the next round is worked on
        for name in names:
            del cargo.updates[name]
        yield from zip(complete, squares, strict=True)


class _Places(dict[str, Tensor]):
    """Where updates arrive, made when the first piece is there."""

    def __init__(self, items: list[ParamStep], key: str) -> None:
        super().__init__()
        self._items = {item.name: item for item in items}
        self._key = key

    def __missing__(self, name: str) -> Tensor:
        item = self._items[name]
        state = item.state[self._key]
        shape = item.parameter.shape
        if isinstance(state, PartitionedTensor):
            shape = state.dealt.shape
        self[name] = torch.empty(shape, dtype=state.dtype, device=state.device)
        return self[name]


def _cargo(items: list[ParamStep], mask: Tensor | None) -> StepTensors:
    """Make one momentum step on what of the state is on this rank."""
    directions: dict[str, Tensor] = {}
    whole: dict[tuple[str, int], Tensor] = {}
    updates = _Places(items, "momentum_buffer")
    for group, part in by_group(items):
        held = [_held(item) for item in part]
        new = momentum_step_(
            [M for parts in held for _, M, _ in parts],
            [G for parts in held for _, _, G in parts],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            mask=mask,
        )
        left = iter(new)
        for item, parts in zip(part, held, strict=True):
            for number, _, _ in parts:
                if number is not None:
                    whole[item.name, number] = next(left)
                    continue
                directions[item.name] = next(left)
                if group["nesterov"]:
                    # A piece has left before its update arrives: the direction's place will do.
                    updates[item.name] = directions[item.name]
    rows = {i.name: i.state[ROW_STATE] for i in items if ROW_STATE in i.state}
    whole_rows = {
        (name, number): part
        for name, state in rows.items()
        if isinstance(state, PartitionedTensor)
        for number, part in state.parts.items()
    }
    return StepTensors(
        directions=directions, updates=updates, rows=rows, whole=whole, whole_rows=whole_rows
    )


def _held(item: ParamStep) -> list[tuple[int | None, Tensor, Tensor]]:
    """Return (number of the matrix or None, momentum, gradient) of what is on this rank."""
    momentum = item.state["momentum_buffer"]
    if not isinstance(momentum, PartitionedTensor):
        return [(None, momentum, item.gradient)]
    return list(_owned(item, "momentum_buffer"))


def _owned(item: ParamStep, key: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (number, state, gradient) of the matrices of which this rank owns the state."""
    state = item.state[key]
    gradient = item.gradient.reshape(state.dealt.shape)
    for piece, part in state.owned():
        yield piece.matrix, part, read_piece(gradient, state.dealt.matrices, piece)


def adamw_domain_(domain: RankGroup, items: list[ParamStep], mask: Tensor | None) -> None:
    """Write one AdamW step into parameters whose state is dealt out. A collective of the domain."""
    whole: dict[tuple[str, int], Tensor] = {}
    for group, part in by_group(items):
        owned = [(item, *parts) for item in part for parts in _owned(item, "exp_avg")]
        updates = adamw_updates_(
            [G for _, _, _, G in owned],
            [M for _, _, M, _ in owned],
            [item.state["exp_avg_sq"].parts[number] for item, number, _, _ in owned],
            [int(item.state["step"]) for item, _, _, _ in owned],
            betas=group["betas"],
            eps=group["eps"],
            mask=mask,
        )
        whole |= {(i.name, n): U for (i, n, _, _), U in zip(owned, updates, strict=True)}
    cargo = StepTensors(
        directions={}, updates=_Places(items, "exp_avg"), rows={}, whole=whole, whole_rows={}
    )
    for _ in _updated(domain, items, cargo, mask):
        pass


def _apply(batch: list[ParamStep], updates: list[Tensor], mask: Tensor | None) -> None:
    left = iter(updates)
    for group, part in by_group(batch):
        apply_updates_(
            _weights(group, part),
            [next(left) for _ in part],
            lr=float(group["lr"]),
            rate=decay_rate(group),
            cautious=group["cautious_decay"],
            mask=mask,
        )


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
    return Rounding(key, part_here(item.placing))
