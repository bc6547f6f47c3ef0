"""One cargo of an exchange, from local tensors to batches of whole matrices and back.

A *cargo* is what travels for every matrix of a plan: its direction and then its update, or one value
per row. It lies as its layouts say, whose matrices have the numbers of the plan's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muonscale.optim.distributed.assignment import (
    MatrixTask,
    OwnerAssignment,
    SubgroupSplit,
    shapes_of,
)
from muonscale.optim.distributed.exchange import Exchange, Pending, Slot, Slots, make_routes
from muonscale.optim.matrices.sharding import Sharding, read_piece, write_piece_

BatchKey = tuple[str, tuple[int, int], SubgroupSplit | None]
"""Kind, shape (out, in) of the plan's whole matrices, and how they are shared."""

Locals = MutableMapping[str, Tensor]
"""Local tensors by parameter name."""

OwnedMatrices = Mapping[tuple[str, int], Tensor]
"""Whole matrices on their owner, by parameter name and number."""


@dataclass(frozen=True)
class MatrixBatch:
    """Matrices of one kind and shape."""

    tasks: list[MatrixTask]
    values: Tensor
    """`[tasks, out, in]`, or this rank's parts of them."""


class Payload:
    """The way of one cargo; every method is for one round."""

    def __init__(
        self,
        plan: OwnerAssignment,
        layouts: Sequence[Sharding],
        exchange: Exchange,
        *,
        wire: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        state: bool = False,
    ) -> None:
        """Make the routes; `state` as for `make_routes`, the rest as for `Exchange.start`."""
        self._plan = plan
        self._layouts = layouts
        self._shapes = [shapes_of(layout) for layout in layouts]
        self._routes = make_routes(plan, layouts, exchange.position, state=state)
        self._rounds: list[list[MatrixTask]] = [[] for _ in range(plan.rounds)]
        for task in plan.tasks:
            self._rounds[task.round].append(task)
        self._exchange = exchange
        self._state = state
        self._dtype = dtype
        self._like = torch.empty(0, dtype=wire, device=device)

    def _name(self, task: MatrixTask) -> str:
        return self._plan.parameters[task.parameter].name

    def _active(self, slots: Slots, active: Collection[str]) -> Slots:
        return [[s for s in theirs if self._name(s.task) in active] for theirs in slots]

    def send_in(self, number: int, tensors: Locals, active: Collection[str]) -> Pending:
        """Begin to send the pieces of local `tensors` to the owners of their matrices."""

        def read(slot: Slot) -> Tensor:
            matrices = self._layouts[slot.task.parameter].matrices
            return read_piece(tensors[self._name(slot.task)], matrices, slot.piece)

        route = self._routes[number]
        leaving, arriving = (self._active(s, active) for s in (route.collect, route.assemble))
        return self._exchange.start(leaving, arriving, read, self._like, moves=route.moves_in)

    def assemble(
        self, number: int, pending: Pending, owned: OwnedMatrices, active: Collection[str]
    ) -> dict[BatchKey, MatrixBatch]:
        """Return the matrices that this rank works on, once their pieces are there."""
        batches, places = self._allocate(number, active)
        for task, place in places.items():
            if (self._name(task), task.matrix) in owned:
                place.copy_(owned[self._name(task), task.matrix])
        for slot, values in pending.finish():
            self._box(places[slot.task], slot).copy_(values)
        return batches

    def _allocate(
        self, number: int, active: Collection[str]
    ) -> tuple[dict[BatchKey, MatrixBatch], dict[MatrixTask, Tensor]]:
        alike: defaultdict[BatchKey, list[MatrixTask]] = defaultdict(list)
        for task in self._rounds[number]:
            if task.owner == self._exchange.position and self._name(task) in active:
                kind = self._plan.parameters[task.parameter].kind
                alike[kind, task.shape, task.split].append(task)
        batches: dict[BatchKey, MatrixBatch] = {}
        places: dict[MatrixTask, Tensor] = {}
        for key, tasks in alike.items():
            shape = self._shape(tasks[0])
            values = self._like.new_empty(len(tasks), *shape, dtype=self._dtype)
            batches[key] = MatrixBatch(tasks, values)
            places |= dict(zip(tasks, values.unbind(), strict=True))
        return batches, places

    def _sizes(self, number: int, active: Collection[str]) -> list[int]:
        """Return the elements that every position works on."""
        sizes = [0] * len(self._plan.ranks)
        for task in self._rounds[number]:
            if self._name(task) in active:
                sizes[task.owner] += math.prod(self._shape(task))
        return sizes

    def _shape(self, task: MatrixTask) -> tuple[int, int]:
        in_ = self._shapes[task.parameter][task.matrix][1]
        if self._state:
            return task.rows[1] - task.rows[0], in_
        return task.rows[1] - task.rows[0], task.columns[1] - task.columns[0]

    def _box(self, part: Tensor, slot: Slot) -> Tensor:
        """Return where a slot's piece is in this rank's part of its matrix."""
        (top, bottom), (left, right) = slot.piece.rows, slot.piece.columns
        row, column = slot.task.rows[0], 0 if self._state else slot.task.columns[0]
        return part[top - row : bottom - row, left - column : right - column]

    def send_out(
        self, number: int, batches: Mapping[BatchKey, MatrixBatch], active: Collection[str]
    ) -> Pending:
        """Begin to send the pieces of this rank's matrices to all that hold them."""
        values = {
            task: value
            for batch in batches.values()
            for task, value in zip(batch.tasks, batch.values.unbind(), strict=True)
        }

        def read(slot: Slot) -> Tensor:
            return self._box(values[slot.task], slot)

        route = self._routes[number]
        leaving, arriving = (self._active(s, active) for s in (route.distribute, route.deliver))
        if route.to_all and route.moves_out:
            own = leaving[self._exchange.position]
            sizes = self._sizes(number, active)
            return self._exchange.start_to_all(own, arriving, read, self._like, sizes)
        return self._exchange.start(leaving, arriving, read, self._like, moves=route.moves_out)

    def deliver(self, pending: Pending, tensors: Locals) -> list[str]:
        """Write what has arrived into local `tensors`; return the parameter's name for every piece."""
        names = []
        for slot, values in pending.finish():
            name = self._name(slot.task)
            matrices = self._layouts[slot.task.parameter].matrices
            write_piece_(tensors[name], matrices, slot.piece, values)
            names.append(name)
        return names

    def pieces_to_come(self, active: Collection[str]) -> dict[str, int]:
        """Return how many pieces `deliver` writes in all rounds, by parameter name."""
        counts = dict.fromkeys(sorted(active), 0)
        for route in self._routes:
            for slots in self._active(route.deliver, active):
                for slot in slots:
                    counts[self._name(slot.task)] += 1
        return counts
