"""Brings pieces to the ranks that own their matrices, and the results back: a plan, carried out.

Per round and direction one `all_to_all_single` of packed pieces, of exactly the sizes that there
are; where nobody has anything to send, none. Both are asynchronous, so that they run while another
round is worked on.

A *cargo* is what travels for every matrix: its direction and then its update, or one value per row.
It lies as a `Sharding` says, whose matrices have the numbers of the plan's.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from muonscale.optim.distributed.assignment import (
    MatrixTask,
    OwnerAssignment,
    copy_of,
    holders,
    source_seat,
)
from muonscale.optim.matrices.sharding import (
    Piece,
    Sharding,
    cut_coordinates,
    pieces_by_matrix,
    seats_by_content,
    within,
)
from muonscale.optim.newton_schulz.subgroup import all_gather_single


@dataclass(frozen=True)
class Slot:
    """A piece, of a parameter's local tensor on this rank or of a task's matrix."""

    task: MatrixTask
    piece: Piece


Slots = list[list[Slot]]
"""By position of the other rank; both sides have the same slots in the same order."""


@dataclass
class Route:
    """What this rank exchanges in one round for one cargo."""

    collect: Slots
    """Pieces of local tensors that leave for the owners."""
    assemble: Slots
    """Pieces of this rank's matrices that arrive."""
    distribute: Slots
    """Pieces of this rank's matrices that leave for those who hold them."""
    deliver: Slots
    """Pieces of local tensors that arrive."""
    moves_in: bool = False
    """Whether any rank sends a piece to another owner."""
    moves_out: bool = False
    to_all: bool = True
    """Whether every rank holds the whole of all that is worked on."""


def make_routes(
    plan: OwnerAssignment, layouts: Sequence[Sharding], position: int, *, state: bool = False
) -> list[Route]:
    """Return this rank's route for every round.

    Args:
        plan: of all ranks.
        layouts: how a cargo lies, for the plan's parameters. Of an `owned` one nothing is collected.
        position: of this rank.
        state: the cargo is one value per row. An `owned` parameter's stays with the owners; members
            of a team that divides columns have all of it alike, and the first gives it back.
    """
    routes = [_empty_route(len(plan.ranks)) for _ in range(plan.rounds)]
    router = _Router(plan, layouts, position, state)
    for task in plan.tasks:
        layout = layouts[task.parameter]
        if not (layout.owned and state):
            router.add(task, layout, routes[task.round])
    return routes


class _Router:
    def __init__(
        self, plan: OwnerAssignment, layouts: Sequence[Sharding], position: int, state: bool
    ) -> None:
        self._ranks = plan.ranks
        self._places = {rank: p for p, rank in enumerate(plan.ranks)}
        self._position = position
        self._state = state
        self._content = [_content(layout, plan.ranks[position]) for layout in layouts]

    def add(self, task: MatrixTask, layout: Sharding, route: Route) -> None:
        """Write into `route` what this rank has to do with a task."""
        owner = layout.ranks.index(self._ranks[task.owner])
        held_by = holders(layout)[task.matrix]
        gives_back = not self._state or task.columns[0] == 0
        route.moves_in |= not layout.owned and any(owner not in h.seats for h in held_by)
        route.moves_out |= gives_back and any(h.seats != (owner,) for h in held_by)
        route.to_all &= layout.replicated and task.split is None
        content = self._content[task.parameter]
        if content is not None and (held := self._slots(task, layout, content)):
            if gives_back:
                route.deliver[task.owner] += held
            if not layout.owned and self._source(layout, content, owner) == self._position:
                route.collect[task.owner] += held
        if task.owner != self._position:
            return
        for holder in held_by:
            theirs = self._slots(task, layout, holder.content)
            if not layout.owned:
                route.assemble[self._source(layout, holder.content, owner)] += theirs
            for seat in holder.seats if gives_back else ():
                route.distribute[self._places[layout.ranks[seat]]] += theirs

    def _source(self, layout: Sharding, content: tuple[int, ...], owner: int) -> int:
        """Return the position that sends what the seats of a content hold."""
        seats = seats_by_content(layout)[content]
        return self._places[layout.ranks[source_seat(seats, owner, copy_of(layout, owner))]]

    def _slots(self, task: MatrixTask, layout: Sharding, content: tuple[int, ...]) -> list[Slot]:
        """Return what of a task lies in a content."""
        columns = (0, sys.maxsize) if self._state else task.columns
        parts = (
            within(piece, task.rows, columns)
            for piece in pieces_by_matrix(layout, content).get(task.matrix, ())
        )
        return [Slot(task, part) for part in parts if part is not None]


def _content(layout: Sharding, rank: int) -> tuple[int, ...] | None:
    if rank not in layout.ranks:
        return None
    return cut_coordinates(layout, layout.ranks.index(rank))


def _empty_route(count: int) -> Route:
    collect, assemble, distribute, deliver = (_no_slots(count) for _ in range(4))
    return Route(collect, assemble, distribute, deliver)


def _no_slots(count: int) -> Slots:
    return [[] for _ in range(count)]


@dataclass
class TrafficLog:
    """What has been sent, counted where it is sent."""

    bytes_sent: int = 0
    collectives: int = 0


@dataclass(frozen=True)
class Exchange:
    """The ranks of a plan, as this one can reach them."""

    group: dist.ProcessGroup | None
    """None where there is but one rank."""
    position: int
    ledger: TrafficLog = field(default_factory=TrafficLog)

    def start(
        self,
        leaving: Slots,
        arriving: Slots,
        read: Callable[[Slot], Tensor],
        like: Tensor,
        *,
        moves: bool,
    ) -> Pending:
        """Begin to send the pieces that `read` gives for the slots in `leaving`.

        Args:
            leaving: by position.
            arriving: likewise.
            read: `[rows, columns]` of a slot, in any dtype.
            like: has the dtype under way and the device.
            moves: whether any rank has something to send to another.
        """
        own = [
            (to, read(slot))
            for to, slot in zip(arriving[self.position], leaving[self.position], strict=True)
        ]
        away, coming = self._others(leaving), self._others(arriving)
        counts, sizes = _elements(away), _elements(coming)
        sent = _packed(
            (read(slot) for slots in away for slot in slots), like.new_empty(sum(counts))
        )
        received = like.new_empty(sum(sizes))
        work = None
        if moves and self.group is not None:
            work = dist.all_to_all_single(
                received, sent, sizes, counts, group=self.group, async_op=True
            )
            self.ledger.bytes_sent += sent.nbytes
            self.ledger.collectives += 1
        expected = [slot for slots in coming for slot in slots]
        parts = [
            (slot, received, end - slot.piece.elements)
            for slot, end in zip(expected, _ends(expected), strict=True)
        ]
        return Pending(work, sent, parts, own)

    def start_to_all(
        self,
        leaving: Sequence[Slot],
        arriving: Slots,
        read: Callable[[Slot], Tensor],
        like: Tensor,
        sizes: Sequence[int],
    ) -> Pending:
        """Begin to send the same pieces to all ranks: nothing is packed more than once.

        Args:
            leaving: of this rank.
            arriving: by position; those of this rank itself are `leaving`, in its parameters.
            read: as for `start`.
            like: as for `start`.
            sizes: elements that every position sends; all send the largest of them.
        """
        values = [read(slot) for slot in leaving]
        own = list(zip(arriving[self.position], values, strict=True))
        sent = _packed(values, like.new_zeros(max(sizes)))
        received = like.new_empty(len(sizes) * max(sizes))
        work = all_gather_single(received, sent, self.group, async_op=True)
        self.ledger.bytes_sent += (len(sizes) - 1) * sent.nbytes
        self.ledger.collectives += 1
        parts = [
            (slot, row, end - slot.piece.elements)
            for row, slots in zip(received.chunk(len(sizes)), self._others(arriving), strict=True)
            for slot, end in zip(slots, _ends(slots), strict=True)
        ]
        return Pending(work, sent, parts, own)

    def _others(self, slots: Slots) -> Slots:
        """Return `slots` without those of this rank itself."""
        others = list(slots)
        others[self.position] = []
        return others


def _packed(values: Iterable[Tensor], room: Tensor) -> Tensor:
    """Write `values` into `room`, one behind the other, and return it."""
    start = 0
    for value in values:
        room[start : start + value.numel()].view(value.shape).copy_(value)
        start += value.numel()
    return room


def _ends(slots: Sequence[Slot]) -> list[int]:
    return list(itertools.accumulate(slot.piece.elements for slot in slots))


def _elements(slots: Slots) -> list[int]:
    return [sum(slot.piece.elements for slot in theirs) for theirs in slots]


@dataclass
class Pending:
    """Pieces under way."""

    work: Any
    sent: Tensor | None
    """Kept until it has been read."""
    parts: list[tuple[Slot, Tensor, int]]
    """What arrives, in which flat tensor, from which element on."""
    own: list[tuple[Slot, Tensor]]
    """What this rank had for itself."""

    def finish(self) -> list[tuple[Slot, Tensor]]:
        """Wait, and return what arrived: slots with their `[rows, columns]`. Nothing is kept."""
        if self.work is not None:
            self.work.wait()
        arrived = [
            (slot, flat[start : start + slot.piece.elements].view(slot.piece.shape))
            for slot, flat, start in self.parts
        ]
        arrived += self.own
        self.work = self.sent = None  # it keeps what it has sent and received
        self.parts.clear()
        self.own.clear()
        return arrived
