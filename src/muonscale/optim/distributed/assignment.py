"""Which rank works on which matrix, and when: pure, the same on every rank, without a process group.

Longest first, every matrix goes to the rank with the least to do, where to do means operations of
Newton-Schulz, and a matrix that lies whole on a rank counts as work to move too. Where there are too
few matrices for the ranks, large ones go to a *team* of ranks each (`muonscale.optim.newton_schulz.subgroup`). The
result does not depend on the order of the parameters. What a rank owns is worked on in *rounds*, so
that what the next round needs can travel meanwhile.

A *position* is a rank's place among the ranks of the plan, in rising order. Teams are blocks of
neighbouring positions.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from muonscale.errors import LayoutError
from muonscale.optim.matrices.sharding import (
    Range,
    Sharding,
    cut_coordinates,
    pieces_by_matrix,
    seats_by_content,
)
from muonscale.optim.matrices.spec import matrix_shapes
from muonscale.optim.newton_schulz.coefficients import Triple
from muonscale.optim.newton_schulz.subgroup import best_split, divided_axis, part_of, split_cost

ROUND_BYTES = 64 * 2**20
"""Cap on what a rank sends in one round, in float32, a copy for each that holds it; assumption,
untested."""

FLOPS_PER_BYTE = 2000.0
"""What a rank computes in the time in which it sends a byte: 100 TFLOP/s over 50 GB/s; assumption."""

TEAM_FLOPS_PER_BYTE = 300.0
"""The same within a team, whose ranks are neighbours in one machine: over 300 GB/s; assumption."""

LARGEST_TEAM = 8
"""Ranks to a matrix at most: those of one machine; assumption."""

EVEN = 1.1
"""Busiest rank over the average up to which no matrix is split."""


@dataclass(frozen=True, kw_only=True)
class ParamCost:
    """A parameter, as the plan sees it."""

    name: str
    layout: Sharding
    kind: str
    """Matrices of one kind and shape are worked on in one batch."""
    flops: tuple[int, ...]
    """Of every matrix, in the order of its numbers."""
    triples: tuple[Triple, ...] = ()
    """Of the polynomial; empty where matrices cannot be split."""
    forms: tuple[tuple[int, ...], ...] = ()
    """Segments (`muonscale.optim.newton_schulz.flops`) that a team may evaluate it by."""


@dataclass(frozen=True)
class MatrixTask:
    """One matrix, or a team member's part of one, for one rank."""

    parameter: int
    """Place of the parameter in the plan."""
    matrix: int
    shape: tuple[int, int]
    """(out, in) of the whole matrix."""
    owner: int
    """Position of the rank that works on it."""
    round: int
    flops: int
    rows: Range
    columns: Range
    """What of the matrix it is."""
    split: SubgroupSplit | None = None


@dataclass(frozen=True)
class SubgroupSplit:
    """How a matrix is shared."""

    team: tuple[int, ...]
    """Positions."""
    segments: tuple[int, ...]
    divided: bool
    """See `Subgroup`."""
    elements: int
    """That each member sends to the others."""


@dataclass(frozen=True)
class OwnerAssignment:
    """The tasks of all ranks."""

    ranks: tuple[int, ...]
    """Global ranks of the positions, rising."""
    parameters: tuple[ParamCost, ...]
    """By name."""
    tasks: tuple[MatrixTask, ...]
    """By parameter and matrix."""
    team_size: int
    """Of the teams that share matrices; 1 where none is shared."""

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
            loads[task.owner] += task.flops
        return loads


def assign_owners(
    parameters: Sequence[ParamCost],
    *,
    owners: Mapping[tuple[str, int], int] | None = None,
    wire_bytes: int = 4,
    round_bytes: int = ROUND_BYTES,
    flops_per_byte: float = FLOPS_PER_BYTE,
    team_flops_per_byte: float = TEAM_FLOPS_PER_BYTE,
    team_size: int | None = None,
) -> OwnerAssignment:
    """Return who works on what.

    Args:
        parameters: all on the same ranks; at least one. Their order has no influence.
        owners: positions that are settled, by parameter name and matrix.
        wire_bytes: bytes of an element under way.
        round_bytes: what a rank sends in one round, in float32 bytes, as often as it is held; one
            matrix is never cut.
        flops_per_byte: how much there must be to save before a matrix that is whole on a rank moves.
        team_flops_per_byte: how much before one is split.
        team_size: ranks to a matrix that is split, a divisor of all; 1 splits none. None takes what
            makes the busiest rank least busy, 1 where that is within 10 % of the average.

    Raises:
        LayoutError: where the parameters are on different ranks, or teams do not divide them.
    """
    ordered = tuple(sorted(parameters, key=lambda parameter: parameter.name))
    ranks = tuple(sorted(ordered[0].layout.ranks))
    for parameter in ordered:
        if tuple(sorted(parameter.layout.ranks)) != ranks:
            raise LayoutError(
                f"{parameter.name} is on ranks {parameter.layout.ranks}, {ordered[0].name} on {ranks}: "
                "parameters of one plan must be on the same ranks"
            )
    if team_size is not None and (team_size < 1 or len(ranks) % team_size):
        raise LayoutError(f"teams of {team_size} do not divide {len(ranks)} ranks; give a divisor")
    dealer = _Dealer(ordered, ranks, owners or {}, wire_bytes * flops_per_byte, team_flops_per_byte)
    dealt = dealer.best() if team_size is None else dealer.deal(team_size)
    rounds = _rounds(ordered, dealer.keys, dealt.teams, round_bytes)
    tasks = [
        task
        for key, team, r in zip(dealer.keys, dealt.teams, rounds, strict=True)
        for task in dealer.tasks(key, team, r)
    ]
    return OwnerAssignment(ranks, ordered, tuple(tasks), dealt.size)


def shapes_of(layout: Sharding) -> list[tuple[int, int]]:
    """Return the (out, in) of every matrix of a parameter, in the order of their numbers."""
    return [
        (out, in_)
        for number, out, in_ in matrix_shapes(layout.shape, layout.matrices)
        for _ in range(number)
    ]


_Key = tuple[int, int, tuple[int, int]]
"""Parameter, matrix, shape."""

_Team = tuple[int, ...]
"""Positions; one for a matrix that is not split."""


@dataclass(frozen=True)
class _Dealt:
    size: int
    teams: list[_Team]
    busiest: float


class _Dealer:
    """Deals matrices out, greedily, longest first."""

    def __init__(
        self,
        parameters: Sequence[ParamCost],
        ranks: tuple[int, ...],
        owners: Mapping[tuple[str, int], int],
        per_element: float,
        team_flops_per_byte: float,
    ) -> None:
        self._parameters = parameters
        self._count = len(ranks)
        self._per_element = per_element
        # within a team float32 travels, whatever does between owners
        self._per_shared = 4 * team_flops_per_byte
        self._homes = [_homes(parameter.layout, ranks) for parameter in parameters]
        self.keys: list[_Key] = [
            (n, matrix, shape)
            for n, parameter in enumerate(parameters)
            for matrix, shape in enumerate(shapes_of(parameter.layout))
        ]
        self._flops = [parameters[n].flops[matrix] for n, matrix, _ in self.keys]
        self._order = sorted(range(len(self.keys)), key=lambda i: (-self._flops[i], i))
        self._settled = {
            i: owners[parameters[n].name, matrix]
            for i, (n, matrix, _) in enumerate(self.keys)
            if (parameters[n].name, matrix) in owners
        }

    def best(self) -> _Dealt:
        """Return what leaves the least to the busiest, without teams where that is even already."""
        alone = self.deal(1)
        if alone.busiest * self._count <= EVEN * sum(self._flops):
            return alone
        sizes = [2**n for n in range(1, LARGEST_TEAM.bit_length())]
        large = sum(self._flops) / self._count / 2
        teams = [self.deal(size, large) for size in sizes if self._count % size == 0]
        best = min(teams, key=lambda dealt: dealt.busiest, default=alone)
        return best if best.busiest < alone.busiest / EVEN else alone

    def deal(self, size: int, large: float = 0.0) -> _Dealt:
        """Return who works on what with teams of `size` for matrices of at least `large` operations."""
        teams: list[_Team] = [()] * len(self.keys)
        loads = [0.0] * self._count
        for i, owner in self._settled.items():
            teams[i] = (owner,)
            loads[owner] += self._flops[i]
        if size > 1:
            self._deal_to_teams(size, large, teams, loads)
        heap = [(load, position) for position, load in enumerate(loads)]
        heapq.heapify(heap)
        for i in self._order:
            if teams[i]:
                continue
            n, matrix, shape = self.keys[i]
            while heap[0][0] != loads[heap[0][1]]:  # an entry from before
                heapq.heappop(heap)
            owner = heap[0][1]
            at_home = min(self._homes[n].get(matrix, ()), key=lambda p: (loads[p], p), default=None)
            moving = 2 * math.prod(shape) * self._per_element
            if at_home is not None and loads[at_home] <= loads[owner] + moving:
                owner = at_home
            teams[i] = (owner,)
            loads[owner] += self._flops[i]
            heapq.heappush(heap, (loads[owner], owner))
        return _Dealt(size, teams, max(loads))

    def _deal_to_teams(
        self, size: int, large: float, teams: list[_Team], loads: list[float]
    ) -> None:
        """Deal out the large matrices, where splitting them saves."""
        heap = [(0.0, first) for first in range(0, self._count, size)]
        for i in self._order:
            if teams[i] or self._flops[i] < large:
                continue
            split = self._split(self.keys[i], size)
            if split is None or split[0] >= self._flops[i]:
                continue
            load, first = heapq.heappop(heap)
            teams[i] = tuple(range(first, first + size))
            heapq.heappush(heap, (load + split[0], first))
        for load, first in heap:
            for position in range(first, first + size):
                loads[position] += load

    def _split(self, key: _Key, size: int) -> tuple[float, tuple[int, ...], bool] | None:
        """Return (cost to a member, segments, divided), or None where it cannot be."""
        n, _, shape = key
        parameter = self._parameters[n]
        if not parameter.forms or parameter.layout.owned or min(shape) < size:
            return None
        return best_split(shape, parameter.triples, parameter.forms, size, self._per_shared)

    def tasks(self, key: _Key, team: _Team, round: int) -> list[MatrixTask]:
        """Return the tasks of a matrix for those that work on it."""
        n, matrix, shape = key
        whole = (0, shape[0]), (0, shape[1])
        if len(team) == 1:
            flops = self._parameters[n].flops[matrix]
            return [MatrixTask(n, matrix, shape, team[0], round, flops, *whole)]
        found = self._split(key, len(team))
        assert found is not None
        _, segments, divided = found
        triples = self._parameters[n].triples
        cost = split_cost(shape, triples, segments, len(team), divided=divided)
        split = SubgroupSplit(team, segments, divided, cost.elements)
        axis = divided_axis(shape)
        tasks = []
        for place, owner in enumerate(team):
            rows = part_of(shape[0], place, len(team)) if axis == "rows" else whole[0]
            columns = part_of(shape[1], place, len(team)) if axis == "columns" else whole[1]
            tasks.append(
                MatrixTask(n, matrix, shape, owner, round, cost.flops, rows, columns, split)
            )
        return tasks


def _homes(layout: Sharding, ranks: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
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
    parameters: Sequence[ParamCost],
    keys: Sequence[_Key],
    teams: Sequence[_Team],
    round_bytes: int,
) -> list[int]:
    """Fill the rounds of every rank: shared matrices first, those of one kind and shape together."""
    rounds = [0] * len(keys)
    filled: dict[int, tuple[int, int]] = {}

    def order(i: int) -> tuple[bool, str, tuple[int, int], int]:
        return len(teams[i]) == 1, parameters[keys[i][0]].kind, keys[i][2], i

    for i in sorted(range(len(keys)), key=order):
        number, so_far = filled.get(teams[i][0], (0, 0))
        copies = parameters[keys[i][0]].layout.copies
        nbytes = 4 * math.prod(keys[i][2]) * copies // len(teams[i])
        if so_far and so_far + nbytes > round_bytes:
            number, so_far = number + 1, 0
        rounds[i] = number
        for position in teams[i]:
            filled[position] = number, so_far + nbytes
    return rounds


@dataclass(frozen=True)
class Holder:
    """Seats that hold the same part of a matrix."""

    content: tuple[int, ...]
    """Their `cut_coordinates`."""
    seats: tuple[int, ...]
    elements: int


@functools.cache
def holders(layout: Sharding) -> tuple[tuple[Holder, ...], ...]:
    """Return who holds what of every matrix, by its number."""
    found: list[list[Holder]] = [[] for _ in shapes_of(layout)]
    for content, seats in seats_by_content(layout).items():
        for matrix, own in pieces_by_matrix(layout, content).items():
            found[matrix].append(Holder(content, seats, sum(piece.elements for piece in own)))
    return tuple(map(tuple, found))


def source_seat(seats: tuple[int, ...], owner: int, copy: int) -> int:
    """Return which of the `seats` that hold the same sends it to the seat `owner`: that if it can.

    Else the one that is in the same copy of the mesh, see `copy_of`.
    """
    return owner if owner in seats else seats[copy]


def copy_of(layout: Sharding, seat: int) -> int:
    """Return which one a seat is among those that hold the same: how often others come before."""
    return seats_by_content(layout)[cut_coordinates(layout, seat)].index(seat)


@functools.cache
def _boxes(layout: Sharding) -> tuple[Tensor, ...]:
    """Return, for every matrix, `[holders, 4]`: the first and last row and column of each holder.

    Where a holder has several pieces of a matrix, several rows; those are in `holders`' order.
    """
    return tuple(
        torch.tensor(
            [
                (number, *piece.rows, *piece.columns)
                for number, holder in enumerate(held)
                for piece in pieces_by_matrix(layout, holder.content)[matrix]
            ]
        )
        for matrix, held in enumerate(holders(layout))
    )


@dataclass(frozen=True)
class Traffic:
    """Elements that travel in one step, by position."""

    sent_in: list[int]
    """Directions, to the owners."""
    sent_out: list[int]
    """Updates, from the owners."""
    shared: list[int]
    """Float32 within teams."""
    received_in: list[int]
    received_out: list[int]


def traffic(plan: OwnerAssignment) -> Traffic:
    """Return what every position sends and receives, as `muonscale.optim.distributed.exchange` does it."""
    sums = Traffic(*([0] * len(plan.ranks) for _ in range(5)))
    positions = _positions_of_seats(plan)
    for task in plan.tasks:
        layout, places = plan.parameters[task.parameter].layout, positions[task.parameter]
        owner = places.index(task.owner) if places[task.owner] != task.owner else task.owner
        copy = copy_of(layout, owner)
        if task.split is not None:
            sums.shared[task.owner] += task.split.elements
        held = holders(layout)[task.matrix]
        for holder, elements in zip(held, _within(layout, task), strict=True):
            source = source_seat(holder.seats, owner, copy)
            if source != owner and not layout.owned:
                sums.sent_in[places[source]] += elements
                sums.received_in[task.owner] += elements
            for seat in holder.seats:
                if seat != owner:
                    sums.sent_out[task.owner] += elements
                    sums.received_out[places[seat]] += elements
    return sums


def _positions_of_seats(plan: OwnerAssignment) -> list[list[int]]:
    """Return the positions of the seats of every parameter."""
    places = {rank: position for position, rank in enumerate(plan.ranks)}
    return [[places[rank] for rank in parameter.layout.ranks] for parameter in plan.parameters]


def _within(layout: Sharding, task: MatrixTask) -> list[int]:
    """Return how many elements of a task every holder of its matrix has."""
    held = holders(layout)[task.matrix]
    if task.split is None:
        return [holder.elements for holder in held]
    boxes = _boxes(layout)[task.matrix]
    rows = boxes[:, 2].clamp(max=task.rows[1]) - boxes[:, 1].clamp(min=task.rows[0])
    columns = boxes[:, 4].clamp(max=task.columns[1]) - boxes[:, 3].clamp(min=task.columns[0])
    elements = rows.clamp(min=0) * columns.clamp(min=0)
    return torch.zeros(len(held), dtype=torch.int64).index_add_(0, boxes[:, 0], elements).tolist()
