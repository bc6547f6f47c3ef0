"""Brings pieces to the ranks that own their matrices, and the results back: a plan, carried out.

Per round and direction one `all_to_all_single` of packed pieces, of exactly the sizes that there
are; where nobody has anything to send, none. Both are asynchronous, so that they run while another
round is worked on.

A *cargo* is what travels for every matrix: its direction and then its update, or one value per row.
It lies as a `Layout` says, whose matrices have the numbers of the plan's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.optim.layout import Layout, Piece, cut_coordinates, pieces
from muonscale.optim.plan import Plan, Task, copy_of, holders, source_seat


@dataclass(frozen=True)
class Slot:
    """A piece, of a parameter's local tensor on this rank or of a task's matrix."""

    task: Task
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


def make_routes(
    plan: Plan, layouts: Sequence[Layout], position: int, *, state: bool = False
) -> list[Route]:
    """Return this rank's route for every round.

    Args:
        plan: of all ranks.
        layouts: how a cargo lies, for the plan's parameters. Of an `owned` one nothing is collected.
        position: of this rank.
        state: the cargo is state, of which an `owned` parameter's stays with the owners.
    """
    count, me = len(plan.ranks), plan.ranks[position]
    routes = [_empty_route(count) for _ in range(plan.rounds)]
    places = {rank: p for p, rank in enumerate(plan.ranks)}
    own = [_pieces_by_matrix(layout, me) for layout in layouts]
    for task in plan.tasks:
        layout = layouts[task.parameter]
        if layout.owned and state:
            continue
        owner = layout.ranks.index(plan.ranks[task.owner])
        copy = copy_of(layout, owner)
        mine = task.owner == position
        route = routes[task.round]
        held = [Slot(task, piece) for piece in own[task.parameter].get(task.matrix, ())]
        route.deliver[task.owner] += held
        for holder in holders(layout)[task.matrix]:
            source = source_seat(holder, owner, copy)
            route.moves_in |= source != owner and not layout.owned
            route.moves_out |= holder.seats != (owner,)
            if layout.ranks[source] == me and not layout.owned:
                route.collect[task.owner] += held
            if mine:
                theirs = [Slot(task, p) for p in _of_matrix(layout, holder.content, task.matrix)]
                if not layout.owned:
                    route.assemble[places[layout.ranks[source]]] += theirs
                for seat in holder.seats:
                    route.distribute[places[layout.ranks[seat]]] += theirs
    return routes


def _empty_route(count: int) -> Route:
    collect, assemble, distribute, deliver = (_no_slots(count) for _ in range(4))
    return Route(collect, assemble, distribute, deliver)


def _no_slots(count: int) -> Slots:
    return [[] for _ in range(count)]


def _pieces_by_matrix(layout: Layout, rank: int) -> dict[int, list[Piece]]:
    found: defaultdict[int, list[Piece]] = defaultdict(list)
    if rank in layout.ranks:
        for piece in pieces(layout, cut_coordinates(layout, layout.ranks.index(rank))):
            found[piece.matrix].append(piece)
    return found


def _of_matrix(layout: Layout, content: tuple[int, ...], matrix: int) -> list[Piece]:
    return [piece for piece in pieces(layout, content) if piece.matrix == matrix]


@dataclass
class Ledger:
    """What has been sent, counted where it is sent."""

    bytes_sent: int = 0
    collectives: int = 0


@dataclass(frozen=True)
class Exchange:
    """The ranks of a plan, as this one can reach them."""

    group: dist.ProcessGroup | None
    """None where there is but one rank."""
    position: int
    ledger: Ledger = field(default_factory=Ledger)

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
        flat = [read(slot).reshape(-1).to(like.dtype) for slots in away for slot in slots]
        sent = torch.cat(flat) if flat else like.new_empty(0)
        counts, sizes = _elements(away), _elements(coming)
        received = like.new_empty(sum(sizes))
        work = None
        if moves and self.group is not None:
            work = dist.all_to_all_single(
                received, sent, sizes, counts, group=self.group, async_op=True
            )
            self.ledger.bytes_sent += sent.nbytes
            self.ledger.collectives += 1
        expected = [slot for slots in coming for slot in slots]
        return Pending(work, sent, received, expected, own)

    def _others(self, slots: Slots) -> Slots:
        """Return `slots` without those of this rank itself."""
        others = list(slots)
        others[self.position] = []
        return others


def _elements(slots: Slots) -> list[int]:
    return [sum(slot.piece.elements for slot in theirs) for theirs in slots]


@dataclass
class Pending:
    """Pieces under way."""

    work: Any
    sent: Tensor
    """Kept until it has been read."""
    received: Tensor
    expected: list[Slot]
    """What `received` is made of."""
    own: list[tuple[Slot, Tensor]]
    """What this rank had for itself."""

    def finish(self) -> list[tuple[Slot, Tensor]]:
        """Wait, and return what arrived: slots with their `[rows, columns]`."""
        if self.work is not None:
            self.work.wait()
        parts = self.received.split([slot.piece.elements for slot in self.expected])
        arrived = [
            (slot, part.view(slot.piece.shape))
            for slot, part in zip(self.expected, parts, strict=True)
        ]
        return arrived + self.own
