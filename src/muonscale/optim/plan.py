"""Which rank works on which matrix, and when: pure, the same on every rank, without a process group.

Longest first, every matrix goes to the rank with the least to do, where to do means operations of
Newton-Schulz, and a matrix that lies whole on a rank counts as work to move too. The result does not
depend on the order of the parameters. What a rank owns is worked on in *rounds*, so that what the
next round needs can travel meanwhile.

A *position* is a rank's place among the ranks of the plan, in rising order.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from muonscale.errors import LayoutError
from muonscale.optim.layout import Layout, cut_coordinates, pieces, seats_by_content
from muonscale.optim.matrices import matrix_shapes

ROUND_BYTES = 64 * 2**20
"""Cap on the float32 matrices that a rank works on in one round; assumption, untested."""

FLOPS_PER_BYTE = 2000.0
"""What a rank computes in the time in which it sends a byte: 100 TFLOP/s over 50 GB/s; assumption."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A parameter, as the plan sees it."""

    name: str
    layout: Layout
    kind: str
    """Matrices of one kind and shape are worked on in one batch."""
    flops: tuple[int, ...]
    """Of every matrix, in the order of its numbers."""


@dataclass(frozen=True)
class Task:
    """One matrix, for one rank."""

    parameter: int
    """Place of the parameter in the plan."""
    matrix: int
    shape: tuple[int, int]
    owner: int
    """Position of the rank that works on it."""
    round: int


@dataclass(frozen=True)
class Plan:
    """The tasks of all ranks."""

    ranks: tuple[int, ...]
    """Global ranks of the positions, rising."""
    parameters: tuple[Planned, ...]
    """By name."""
    tasks: tuple[Task, ...]
    """By parameter and matrix."""

    @property
    def rounds(self) -> int:
        """Number of rounds, the same for every rank."""
        return 1 + max((task.round for task in self.tasks), default=-1)

    @cached_property
    def digest(self) -> str:
        """Equal where the plan is."""
        return hashlib.sha256(repr((self.ranks, self.parameters, self.tasks)).encode()).hexdigest()

    def loads(self) -> list[int]:
        """Return the operations of every position."""
        loads = [0] * len(self.ranks)
        for task in self.tasks:
            loads[task.owner] += self.parameters[task.parameter].flops[task.matrix]
        return loads


def make_plan(
    parameters: Sequence[Planned],
    *,
    owners: Mapping[tuple[str, int], int] | None = None,
    wire_bytes: int = 4,
    round_bytes: int = ROUND_BYTES,
    flops_per_byte: float = FLOPS_PER_BYTE,
) -> Plan:
    """Return who works on what.

    Args:
        parameters: all on the same ranks; at least one. Their order has no influence.
        owners: positions that are settled, by parameter name and matrix.
        wire_bytes: bytes of an element under way.
        round_bytes: what a rank owns in one round, in float32 bytes; one matrix is never cut.
        flops_per_byte: how much there must be to save before a matrix that is whole on a rank moves.

    Raises:
        LayoutError: where the parameters are on different ranks.
    """
    ordered = tuple(sorted(parameters, key=lambda parameter: parameter.name))
    ranks = tuple(sorted(ordered[0].layout.ranks))
    for parameter in ordered:
        if tuple(sorted(parameter.layout.ranks)) != ranks:
            raise LayoutError(
                f"{parameter.name} is on ranks {parameter.layout.ranks}, {ordered[0].name} on {ranks}: "
                "one plan is for parameters on the same ranks"
            )
    keys = [
        (n, matrix, shape)
        for n, parameter in enumerate(ordered)
        for matrix, shape in enumerate(shapes_of(parameter.layout))
    ]
    settled = {
        i: owners[ordered[n].name, matrix]
        for i, (n, matrix, _) in enumerate(keys)
        if owners is not None and (ordered[n].name, matrix) in owners
    }
    owning = _owners(ordered, keys, ranks, settled, wire_bytes * flops_per_byte)
    rounds = _rounds(ordered, keys, owning, round_bytes)
    tasks = (Task(*key, owner, r) for key, owner, r in zip(keys, owning, rounds, strict=True))
    return Plan(ranks, ordered, tuple(tasks))


def shapes_of(layout: Layout) -> list[tuple[int, int]]:
    """Return the (out, in) of every matrix of a parameter, in the order of their numbers."""
    return [
        (out, in_)
        for number, out, in_ in matrix_shapes(layout.shape, layout.matrices)
        for _ in range(number)
    ]


_Key = tuple[int, int, tuple[int, int]]


def _owners(
    parameters: Sequence[Planned],
    keys: Sequence[_Key],
    ranks: tuple[int, ...],
    settled: Mapping[int, int],
    per_element: float,
) -> list[int]:
    """Greedy, longest first. `per_element`: operations that moving an element is worth, one way."""
    homes = [_homes(parameter.layout, ranks) for parameter in parameters]
    # loads[position] is current; the heap holds older entries too, which are dropped when met
    loads = [0.0] * len(ranks)
    owners = [0] * len(keys)
    flops = [parameters[n].flops[matrix] for n, matrix, _ in keys]
    for i, owner in settled.items():
        owners[i] = owner
        loads[owner] += flops[i]
    heap = [(load, position) for position, load in enumerate(loads)]
    heapq.heapify(heap)
    for i in sorted(range(len(keys)), key=lambda i: (-flops[i], i)):
        if i in settled:
            continue
        n, matrix, shape = keys[i]
        while heap[0][0] != loads[heap[0][1]]:
            heapq.heappop(heap)
        owner = heap[0][1]
        at_home = min(homes[n].get(matrix, ()), key=lambda p: (loads[p], p), default=None)
        moving = 2 * math.prod(shape) * per_element
        if at_home is not None and loads[at_home] <= loads[owner] + moving:
            owner = at_home
        owners[i] = owner
        loads[owner] += flops[i]
        heapq.heappush(heap, (loads[owner], owner))
    return owners


def _homes(layout: Layout, ranks: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Return the positions that hold the whole of a matrix, by matrix, where there are such."""
    if layout.owned:
        return {}
    position = {rank: p for p, rank in enumerate(ranks)}
    return {
        matrix: tuple(position[layout.ranks[seat]] for seat in held[0].seats)
        for matrix, held in enumerate(holders(layout))
        if len(held) == 1
    }


def _rounds(
    parameters: Sequence[Planned],
    keys: Sequence[_Key],
    owners: Sequence[int],
    round_bytes: int,
) -> list[int]:
    """Fill the rounds of every rank with its matrices, those of one kind and shape together."""
    rounds = [0] * len(keys)
    filled: dict[int, tuple[int, int]] = {}
    for i in sorted(range(len(keys)), key=lambda i: (parameters[keys[i][0]].kind, keys[i][2], i)):
        number, so_far = filled.get(owners[i], (0, 0))
        nbytes = 4 * math.prod(keys[i][2])
        if so_far and so_far + nbytes > round_bytes:
            number, so_far = number + 1, 0
        rounds[i] = number
        filled[owners[i]] = number, so_far + nbytes
    return rounds


@dataclass(frozen=True)
class Holder:
    """Seats that hold the same part of a matrix."""

    content: tuple[int, ...]
    """Their `cut_coordinates`."""
    seats: tuple[int, ...]
    elements: int


@functools.cache
def holders(layout: Layout) -> tuple[tuple[Holder, ...], ...]:
    """Return who holds what of every matrix, by its number."""
    found: list[list[Holder]] = [[] for _ in shapes_of(layout)]
    for content, seats in seats_by_content(layout).items():
        elements: defaultdict[int, int] = defaultdict(int)
        for piece in pieces(layout, content):
            elements[piece.matrix] += piece.elements
        for matrix, number in elements.items():
            found[matrix].append(Holder(content, seats, number))
    return tuple(map(tuple, found))


def source_seat(holder: Holder, owner: int, copy: int) -> int:
    """Return which seat sends its part of a matrix to the seat `owner`: that itself if it can.

    Else the one of `holder` that is in the same copy of the mesh, see `copy_of`.
    """
    return owner if owner in holder.seats else holder.seats[copy]


def copy_of(layout: Layout, seat: int) -> int:
    """Return which one a seat is among those that hold the same: how often others come before."""
    return seats_by_content(layout)[cut_coordinates(layout, seat)].index(seat)


@dataclass(frozen=True)
class Traffic:
    """Elements that travel in one step, by position."""

    sent_in: list[int]
    """Directions, to the owners."""
    sent_out: list[int]
    """Updates, from the owners."""
    received_in: list[int]
    received_out: list[int]


def traffic(plan: Plan) -> Traffic:
    """Return what every position sends and receives, as `muonscale.optim.exchange` does it."""
    sums = Traffic(*([0] * len(plan.ranks) for _ in range(4)))
    places = {rank: position for position, rank in enumerate(plan.ranks)}
    for task in plan.tasks:
        layout = plan.parameters[task.parameter].layout
        owner = layout.ranks.index(plan.ranks[task.owner])
        copy = copy_of(layout, owner)
        for holder in holders(layout)[task.matrix]:
            source = source_seat(holder, owner, copy)
            if source != owner and not layout.owned:
                sums.sent_in[places[layout.ranks[source]]] += holder.elements
                sums.received_in[task.owner] += holder.elements
            for seat in holder.seats:
                if seat != owner:
                    sums.sent_out[task.owner] += holder.elements
                    sums.received_out[places[layout.ranks[seat]]] += holder.elements
    return sums
