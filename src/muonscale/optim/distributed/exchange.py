"""The exchange of tensors between the ranks that hold them and the ranks that own their matrices.

A *payload* is one value per element or one per row of each matrix: directions that become updates,
or per-row state. `Payload` packs local tensors for the owners (`collect`), builds batches of whole
matrices from what arrives (`assemble`), sends the results to all ranks that hold a piece
(`distribute`), and writes what arrives into local tensors (`deliver`).

`make_routes` computes from the assignment which pieces a rank sends and receives. `Exchange` sends
them: one `all_to_all_single` per round and direction, with exact sizes, and none if no rank has
anything to send. If every rank needs all results, it is one all-gather. Both are asynchronous, so
that they run during the update of another round.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.optim.distributed.assignment import (
    MatrixTask,
    OwnerAssignment,
    SubgroupSplit,
    replica_index,
    replica_sets,
    shapes_of,
    source_mesh_rank,
)
from muonscale.optim.matrices.sharding import (
    Piece,
    Sharding,
    intersect,
    pieces_by_matrix,
    read_piece,
    shard_coordinates,
    write_piece_,
)
from muonscale.optim.newton_schulz.subgroup import all_gather_single


@dataclass(frozen=True)
class Slot:
    """A piece of a parameter's local tensor, or of a task's matrix, on this rank."""

    task: MatrixTask
    piece: Piece


Slots = list[list[Slot]]
"""Slots for each group rank. Sender and receiver have the same slots in the same order."""


@dataclass
class Route:
    """The slots that this rank exchanges for one payload in one round."""

    collect: Slots
    """Pieces of local tensors to send to the owners."""
    assemble: Slots
    """Pieces of this rank's matrices to receive."""
    distribute: Slots
    """Pieces of this rank's matrices to send to the ranks that hold them."""
    deliver: Slots
    """Pieces of local tensors to receive."""
    moves_in: bool = False
    """Whether any rank sends a piece to another rank in `collect`."""
    moves_out: bool = False
    """Whether any rank sends a piece to another rank in `distribute`."""
    to_all: bool = True
    """Whether every rank holds the whole of every matrix of the round."""


StateKind = Literal["row", "element"]
"""State per row of each matrix, or per element."""


def make_routes(
    assignment: OwnerAssignment,
    shardings: Sequence[Sharding],
    group_rank: int,
    *,
    state: StateKind | None = None,
) -> list[Route]:
    """Return this rank's route for each round.

    Args:
        assignment: assignment of all ranks.
        shardings: shardings of the payload, one for each parameter of the assignment. Nothing is
            collected for a `partitioned` one.
        group_rank: group rank of this process.
        state: the kind of state, if the payload is state. The state of a `partitioned` parameter
            stays on its owner. If a subgroup divides columns, every member computes the same values
            of per-row state, and the first one sends them.
    """
    ranks = assignment.ranks
    group_ranks = {rank: n for n, rank in enumerate(ranks)}
    routes = [
        Route([[] for _ in ranks], [[] for _ in ranks], [[] for _ in ranks], [[] for _ in ranks])
        for _ in range(assignment.rounds)
    ]
    coords = [
        shard_coordinates(s, s.ranks.index(ranks[group_rank]))
        if ranks[group_rank] in s.ranks
        else None
        for s in shardings
    ]
    for task in assignment.tasks:
        sharding, route = shardings[task.parameter], routes[task.round]
        if sharding.partitioned and state:
            continue
        owner = sharding.ranks.index(ranks[task.owner])
        replica = replica_index(sharding, owner)
        sets = replica_sets(sharding)[task.matrix]
        sends_results = state != "row" or task.columns[0] == 0
        route.moves_in |= not sharding.partitioned and any(owner not in s.mesh_ranks for s in sets)
        route.moves_out |= sends_results and any(s.mesh_ranks != (owner,) for s in sets)
        route.to_all &= sharding.replicated and task.split is None
        for replicas in sets:
            holds = replicas.shard_coord == coords[task.parameter]
            owns = task.owner == group_rank
            if not (holds or owns):
                continue
            slots = _find_slots(task, sharding, replicas.shard_coord, state)
            source = source_mesh_rank(replicas.mesh_ranks, owner, replica)
            source = group_ranks[sharding.ranks[source]]
            if holds and sends_results:
                route.deliver[task.owner] += slots
            if holds and source == group_rank and not sharding.partitioned:
                route.collect[task.owner] += slots
            if owns and not sharding.partitioned:
                route.assemble[source] += slots
            if owns and sends_results:
                for mesh_rank in replicas.mesh_ranks:
                    route.distribute[group_ranks[sharding.ranks[mesh_rank]]] += slots
    return routes


def _find_slots(
    task: MatrixTask, sharding: Sharding, shard_coord: tuple[int, ...], state: StateKind | None
) -> list[Slot]:
    """Return the pieces of a task that a shard holds."""
    columns = (0, sys.maxsize) if state == "row" else task.columns
    pieces = (
        intersect(piece, task.rows, columns)
        for piece in pieces_by_matrix(sharding, shard_coord).get(task.matrix, ())
    )
    return [Slot(task, piece) for piece in pieces if piece is not None]


@dataclass
class TrafficLog:
    """Bytes and collectives that this rank has sent."""

    bytes_sent: int = 0
    collectives: int = 0


@dataclass(frozen=True)
class Exchange:
    """Sends pieces between the ranks of an assignment."""

    group: dist.ProcessGroup | None
    """None if there is only one rank."""
    group_rank: int
    """Group rank of this process."""
    log: TrafficLog = field(default_factory=TrafficLog)

    def start(
        self,
        outgoing: Slots,
        incoming: Slots,
        read: Callable[[Slot], Tensor],
        like: Tensor,
        *,
        moves: bool,
    ) -> Pending:
        """Start an all-to-all of the pieces in `outgoing`.

        Args:
            outgoing: slots to send, for each group rank.
            incoming: slots to receive, for each group rank.
            read: returns `[rows, columns]` of a slot, in any dtype.
            like: a tensor with the dtype and device of the message.
            moves: whether any rank sends a piece to another rank.
        """
        own = [
            (to, read(slot))
            for to, slot in zip(incoming[self.group_rank], outgoing[self.group_rank], strict=True)
        ]
        sending, receiving = self._others(outgoing), self._others(incoming)
        counts, sizes = _elements(sending), _elements(receiving)
        sent = _pack_(
            (read(slot) for slots in sending for slot in slots), like.new_empty(sum(counts))
        )
        received = like.new_empty(sum(sizes))
        work = None
        if moves and self.group is not None:
            work = dist.all_to_all_single(
                received, sent, sizes, counts, group=self.group, async_op=True
            )
            self.log.bytes_sent += sent.nbytes
            self.log.collectives += 1
        expected = [slot for slots in receiving for slot in slots]
        parts = [
            (slot, received, end - slot.piece.elements)
            for slot, end in zip(expected, _ends(expected), strict=True)
        ]
        return Pending(work, sent, parts, own)

    def start_to_all(
        self,
        outgoing: Sequence[Slot],
        incoming: Slots,
        read: Callable[[Slot], Tensor],
        like: Tensor,
        sizes: Sequence[int],
    ) -> Pending:
        """Start an all-gather: every rank receives the same pieces, and each is packed once.

        Args:
            outgoing: slots of this rank.
            incoming: slots to receive, for each group rank. For this rank they are the local
                counterparts of `outgoing`.
            read: as for `start`.
            like: as for `start`.
            sizes: elements that each group rank sends. Messages are padded to the largest.
        """
        values = [read(slot) for slot in outgoing]
        own = list(zip(incoming[self.group_rank], values, strict=True))
        sent = _pack_(values, like.new_zeros(max(sizes)))
        received = like.new_empty(len(sizes) * max(sizes))
        work = all_gather_single(received, sent, self.group, async_op=True)
        self.log.bytes_sent += (len(sizes) - 1) * sent.nbytes
        self.log.collectives += 1
        parts = [
            (slot, row, end - slot.piece.elements)
            for row, slots in zip(received.chunk(len(sizes)), self._others(incoming), strict=True)
            for slot, end in zip(slots, _ends(slots), strict=True)
        ]
        return Pending(work, sent, parts, own)

    def _others(self, slots: Slots) -> Slots:
        """Return `slots` with none for this rank itself."""
        others = list(slots)
        others[self.group_rank] = []
        return others


def _pack_(values: Iterable[Tensor], buffer: Tensor) -> Tensor:
    """Write `values` into the flat `buffer`, one after the other, and return it."""
    start = 0
    for value in values:
        buffer[start : start + value.numel()].view(value.shape).copy_(value)
        start += value.numel()
    return buffer


def _ends(slots: Sequence[Slot]) -> list[int]:
    return list(itertools.accumulate(slot.piece.elements for slot in slots))


def _elements(slots: Slots) -> list[int]:
    return [sum(slot.piece.elements for slot in theirs) for theirs in slots]


@dataclass
class Pending:
    """An exchange that has been started."""

    work: Any
    """Handle of the collective; None if there is none."""
    sent: Tensor | None
    """Send buffer, kept alive until the collective has finished."""
    parts: list[tuple[Slot, Tensor, int]]
    """Each slot to receive, with its flat buffer and its offset there."""
    own: list[tuple[Slot, Tensor]]
    """Slots that this rank sends to itself, with their values."""

    def finish(self) -> list[tuple[Slot, Tensor]]:
        """Wait, return each received slot with its `[rows, columns]`, and release the buffers."""
        if self.work is not None:
            self.work.wait()
        arrived = [
            (slot, flat[start : start + slot.piece.elements].view(slot.piece.shape))
            for slot, flat, start in self.parts
        ]
        arrived += self.own
        self.work = self.sent = None  # the work holds references to both buffers
        self.parts.clear()
        self.own.clear()
        return arrived


BatchKey = tuple[str, tuple[int, int], SubgroupSplit | None]
"""Kind, shape (out, in) of the whole matrices, and how a subgroup splits them."""

Locals = MutableMapping[str, Tensor]
"""Local tensors by parameter name."""

OwnedValues = Mapping[tuple[str, int], Tensor]
"""Whole matrices on their owner, by parameter name and matrix."""


@dataclass(frozen=True)
class MatrixBatch:
    """Matrices of one kind and shape."""

    tasks: list[MatrixTask]
    values: Tensor
    """`[tasks, out, in]`, or this rank's part of each matrix if it is split."""


class Payload:
    """One payload of an assignment. Every method works on one round."""

    def __init__(
        self,
        assignment: OwnerAssignment,
        shardings: Sequence[Sharding],
        exchange: Exchange,
        *,
        comm_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        state: StateKind | None = None,
    ) -> None:
        """Make the routes.

        Args:
            assignment: as for `make_routes`.
            shardings: as for `make_routes`.
            exchange: sends the pieces.
            comm_dtype: dtype of the messages.
            dtype: dtype of the batches.
            device: device of messages and batches.
            state: as for `make_routes`.
        """
        self._assignment = assignment
        self._shardings = shardings
        self._shapes = [shapes_of(sharding) for sharding in shardings]
        self._routes = make_routes(assignment, shardings, exchange.group_rank, state=state)
        self._rounds: list[list[MatrixTask]] = [[] for _ in range(assignment.rounds)]
        for task in assignment.tasks:
            self._rounds[task.round].append(task)
        self._exchange = exchange
        self._state = state
        self._dtype = dtype
        self._like = torch.empty(0, dtype=comm_dtype, device=device)

    def collect(self, number: int, tensors: Locals, active: Collection[str]) -> Pending:
        """Start to send the pieces of local `tensors` to the owners of their matrices."""

        def read(slot: Slot) -> Tensor:
            matrices = self._shardings[slot.task.parameter].matrices
            return read_piece(tensors[self._name(slot.task)], matrices, slot.piece)

        route = self._routes[number]
        outgoing, incoming = (self._select(s, active) for s in (route.collect, route.assemble))
        return self._exchange.start(outgoing, incoming, read, self._like, moves=route.moves_in)

    def assemble(
        self, number: int, pending: Pending, owned: OwnedValues, active: Collection[str]
    ) -> dict[BatchKey, MatrixBatch]:
        """Return batches of the matrices of this rank, from `owned` and from what has arrived."""
        by_key: defaultdict[BatchKey, list[MatrixTask]] = defaultdict(list)
        for task in self._rounds[number]:
            if task.owner == self._exchange.group_rank and self._name(task) in active:
                kind = self._assignment.parameters[task.parameter].kind
                by_key[kind, task.shape, task.split].append(task)
        batches: dict[BatchKey, MatrixBatch] = {}
        places: dict[MatrixTask, Tensor] = {}
        for key, tasks in by_key.items():
            shape = self._shape(tasks[0])
            values = self._like.new_empty(len(tasks), *shape, dtype=self._dtype)
            batches[key] = MatrixBatch(tasks, values)
            places |= dict(zip(tasks, values.unbind(), strict=True))
        for task, place in places.items():
            if (self._name(task), task.matrix) in owned:
                place.copy_(owned[self._name(task), task.matrix])
        for slot, values in pending.finish():
            self._view(places[slot.task], slot).copy_(values)
        return batches

    def distribute(
        self, number: int, batches: Mapping[BatchKey, MatrixBatch], active: Collection[str]
    ) -> Pending:
        """Start to send the pieces of this rank's matrices to all ranks that hold them."""
        values = {
            task: value
            for batch in batches.values()
            for task, value in zip(batch.tasks, batch.values.unbind(), strict=True)
        }

        def read(slot: Slot) -> Tensor:
            return self._view(values[slot.task], slot)

        route = self._routes[number]
        outgoing, incoming = (self._select(s, active) for s in (route.distribute, route.deliver))
        if not (route.to_all and route.moves_out):
            return self._exchange.start(outgoing, incoming, read, self._like, moves=route.moves_out)
        sizes = [0] * len(self._assignment.ranks)
        for task in self._rounds[number]:
            if self._name(task) in active:
                sizes[task.owner] += math.prod(self._shape(task))
        own = outgoing[self._exchange.group_rank]
        return self._exchange.start_to_all(own, incoming, read, self._like, sizes)

    def deliver(self, pending: Pending, tensors: Locals) -> list[str]:
        """Write what has arrived into local `tensors`; return the parameter name of each piece."""
        names = []
        for slot, values in pending.finish():
            name = self._name(slot.task)
            matrices = self._shardings[slot.task.parameter].matrices
            write_piece_(tensors[name], matrices, slot.piece, values)
            names.append(name)
        return names

    def count_deliveries(self, active: Collection[str]) -> dict[str, int]:
        """Return how many pieces `deliver` writes in all rounds, by parameter name."""
        counts = dict.fromkeys(sorted(active), 0)
        for route in self._routes:
            for slots in self._select(route.deliver, active):
                for slot in slots:
                    counts[self._name(slot.task)] += 1
        return counts

    def _name(self, task: MatrixTask) -> str:
        return self._assignment.parameters[task.parameter].name

    def _select(self, slots: Slots, active: Collection[str]) -> Slots:
        return [[s for s in theirs if self._name(s.task) in active] for theirs in slots]

    def _shape(self, task: MatrixTask) -> tuple[int, int]:
        """Return the shape of a task's values: its part of the matrix, or that part's row state."""
        in_ = self._shapes[task.parameter][task.matrix][1]
        if self._state == "row":
            return task.rows[1] - task.rows[0], in_
        return task.rows[1] - task.rows[0], task.columns[1] - task.columns[0]

    def _view(self, part: Tensor, slot: Slot) -> Tensor:
        """Return the view of a slot's piece in this rank's part of its matrix."""
        (top, bottom), (left, right) = slot.piece.rows, slot.piece.columns
        row, column = slot.task.rows[0], 0 if self._state == "row" else slot.task.columns[0]
        return part[top - row : bottom - row, left - column : right - column]
