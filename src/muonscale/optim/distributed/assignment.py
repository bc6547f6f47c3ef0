"""Assignment of matrices to the ranks that update them.

The assignment is a pure function of shapes and costs. It needs no process group, and every rank
computes the same one, whatever the order of the parameters.

Matrices are assigned greedily by Newton-Schulz FLOPs, longest first, each to the least loaded rank.
Moving a matrix that is already whole on one rank is charged as extra work. If there are too few
matrices to balance the ranks, a *subgroup* of ranks shares each large matrix
(`muonscale.optim.newton_schulz.subgroup`). The tasks of a rank are divided into *rounds*: the
exchange for the next round runs during the current one.

A *group rank* is the index of a rank in the assignment's ranks, which are sorted. A subgroup is a
block of consecutive group ranks.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from muonscale.errors import LayoutError
from muonscale.optim.matrices.batches import row_state_sharding
from muonscale.optim.matrices.sharding import (
    Range,
    Sharding,
    pieces_by_matrix,
    replicas_by_coord,
    shard_coordinates,
)
from muonscale.optim.matrices.spec import matrix_shapes
from muonscale.optim.newton_schulz.coefficients import Triple
from muonscale.optim.newton_schulz.subgroup import best_split, divided_axis, part_of, split_cost

ROUND_BYTES = 64 * 2**20
"""Most bytes that a rank sends in one round, counted in float32 and once for each replica. An
assumption; untested."""

FLOPS_PER_BYTE = 2000.0
"""FLOPs that a rank computes while it sends one byte: 100 TFLOP/s over 50 GB/s. An assumption."""

SUBGROUP_FLOPS_PER_BYTE = 300.0
"""The same within a subgroup, whose ranks are in one machine: over 300 GB/s. An assumption."""

LARGEST_SUBGROUP = 8
"""Most ranks that share one matrix: those of one machine. An assumption."""

BALANCED_RATIO = 1.1
"""No matrix is split if the busiest rank has at most this many times the average load."""


@dataclass(frozen=True, kw_only=True)
class ParamCost:
    """Cost of updating one parameter."""

    name: str
    sharding: Sharding
    kind: str
    """Matrices of the same kind and shape are updated in one batch."""
    flops: tuple[int, ...]
    """FLOPs of each matrix, in order."""
    triples: tuple[Triple, ...] = ()
    """Coefficients of the polynomial; empty if the matrices cannot be split."""
    forms: tuple[tuple[int, ...], ...] = ()
    """Segments (`muonscale.optim.newton_schulz.flops`) that a subgroup may evaluate it by."""
    polar_runs: tuple[int, ...] = ()
    """How often it is evaluated on each matrix; once if empty."""

    def runs(self, matrix: int) -> int:
        """Return how often the polynomial is evaluated on a matrix."""
        return self.polar_runs[matrix] if self.polar_runs else 1


@dataclass(frozen=True)
class MatrixTask:
    """One matrix, or one subgroup member's part of it, assigned to one rank."""

    parameter: int
    """Index of the parameter in the assignment."""
    matrix: int
    shape: tuple[int, int]
    """(out, in) of the whole matrix."""
    owner: int
    """Group rank that computes the update."""
    round: int
    flops: int
    rows: Range
    """Rows of the matrix that the task covers."""
    columns: Range
    split: SubgroupSplit | None = None


@dataclass(frozen=True)
class SubgroupSplit:
    """How a subgroup shares one matrix."""

    group_ranks: tuple[int, ...]
    """Members of the subgroup."""
    segments: tuple[int, ...]
    divided: bool
    """See `Subgroup`."""
    elements: int
    """Elements that each member sends to the others."""


@dataclass(frozen=True)
class OwnerAssignment:
    """The tasks of all ranks."""

    ranks: tuple[int, ...]
    """Global rank of each group rank, sorted."""
    parameters: tuple[ParamCost, ...]
    """Sorted by name."""
    tasks: tuple[MatrixTask, ...]
    """Sorted by parameter and matrix."""
    subgroup_size: int
    """Number of ranks that share a split matrix; 1 if none is split."""

    @property
    def rounds(self) -> int:
        """Number of rounds, the same for every rank."""
        return 1 + max((task.round for task in self.tasks), default=-1)

    @cached_property
    def digest(self) -> str:
        """Hash of the assignment: equal assignments have equal digests."""
        return hashlib.sha256(repr((self.ranks, self.parameters, self.tasks)).encode()).hexdigest()

    def loads(self) -> list[int]:
        """Return the FLOPs of each group rank."""
        loads = [0] * len(self.ranks)
        for task in self.tasks:
            loads[task.owner] += task.flops
        return loads


def assign_owners(
    parameters: Sequence[ParamCost],
    *,
    owners: Mapping[tuple[str, int], int] | None = None,
    comm_bytes: int = 4,
    round_bytes: int = ROUND_BYTES,
    flops_per_byte: float = FLOPS_PER_BYTE,
    subgroup_flops_per_byte: float = SUBGROUP_FLOPS_PER_BYTE,
    subgroup_size: int | None = None,
) -> OwnerAssignment:
    """Assign every matrix to a rank, or to a subgroup of ranks.

    Args:
        parameters: at least one, all on the same ranks. Their order has no effect.
        owners: group ranks that are already fixed, by parameter name and matrix.
        comm_bytes: bytes of one element in a message.
        round_bytes: most bytes that a rank sends in one round, counted in float32 and once for each
            replica. A single matrix may exceed it.
        flops_per_byte: a matrix that is whole on a rank moves only if this many FLOPs are saved for
            each byte.
        subgroup_flops_per_byte: the same for splitting a matrix.
        subgroup_size: number of ranks that share a split matrix, a divisor of the number of ranks;
            1 splits no matrix. With None, the size that minimizes the load of the busiest rank, or
            1 if that load is already within 10 % of the average.

    Raises:
        LayoutError: if the parameters are on different ranks, or `subgroup_size` does not divide
            the number of ranks.
    """
    ordered = tuple(sorted(parameters, key=lambda parameter: parameter.name))
    ranks = tuple(sorted(ordered[0].sharding.ranks))
    for parameter in ordered:
        if tuple(sorted(parameter.sharding.ranks)) != ranks:
            raise LayoutError(
                f"{parameter.name} is on ranks {parameter.sharding.ranks}, but {ordered[0].name} is "
                f"on {ranks}: the parameters of one assignment must be on the same ranks"
            )
    if subgroup_size is not None and (subgroup_size < 1 or len(ranks) % subgroup_size):
        raise LayoutError(f"subgroup_size={subgroup_size} does not divide {len(ranks)} ranks")
    assigner = _Assigner(
        ordered, ranks, owners or {}, comm_bytes * flops_per_byte, subgroup_flops_per_byte
    )
    chosen = assigner.find_best() if subgroup_size is None else assigner.assign(subgroup_size)
    rounds = _assign_rounds(ordered, assigner.keys, chosen.subgroups, round_bytes)
    tasks = [
        task
        for key, subgroup, r in zip(assigner.keys, chosen.subgroups, rounds, strict=True)
        for task in assigner.make_tasks(key, subgroup, r)
    ]
    return OwnerAssignment(ranks, ordered, tuple(tasks), chosen.size)


def shapes_of(sharding: Sharding) -> list[tuple[int, int]]:
    """Return the (out, in) of each matrix of a parameter, in order."""
    return [
        (out, in_)
        for number, out, in_ in matrix_shapes(sharding.shape, sharding.matrices)
        for _ in range(number)
    ]


_Key = tuple[int, int, tuple[int, int]]
"""Parameter, matrix, shape."""

_GroupRanks = tuple[int, ...]
"""Group ranks that share a matrix; a single one if it is not split."""


@dataclass(frozen=True)
class _OwnerCandidate:
    """An assignment that is not yet divided into rounds."""

    size: int
    """Number of ranks in a subgroup."""
    subgroups: list[_GroupRanks]
    """Group ranks of each matrix."""
    busiest: float
    """Load of the busiest rank."""


class _Assigner:
    """Assigns matrices greedily, longest first."""

    def __init__(
        self,
        parameters: Sequence[ParamCost],
        ranks: tuple[int, ...],
        owners: Mapping[tuple[str, int], int],
        flops_per_element: float,
        subgroup_flops_per_byte: float,
    ) -> None:
        self._parameters = parameters
        self._count = len(ranks)
        self._flops_per_element = flops_per_element
        # A subgroup exchanges float32, whatever the dtype of the other messages is.
        self._flops_per_shared_element = 4 * subgroup_flops_per_byte
        self._homes = [_find_homes(parameter.sharding, ranks) for parameter in parameters]
        self.keys: list[_Key] = [
            (n, matrix, shape)
            for n, parameter in enumerate(parameters)
            for matrix, shape in enumerate(shapes_of(parameter.sharding))
        ]
        self._flops = [parameters[n].flops[matrix] for n, matrix, _ in self.keys]
        self._order = sorted(range(len(self.keys)), key=lambda i: (-self._flops[i], i))
        self._fixed = {
            i: owners[parameters[n].name, matrix]
            for i, (n, matrix, _) in enumerate(self.keys)
            if (parameters[n].name, matrix) in owners
        }

    def find_best(self) -> _OwnerCandidate:
        """Return the candidate whose busiest rank has the least work.

        No matrix is split if the load is already even, or if splitting hardly helps.
        """
        unsplit = self.assign(1)
        if unsplit.busiest * self._count <= BALANCED_RATIO * sum(self._flops):
            return unsplit
        sizes = [2**n for n in range(1, LARGEST_SUBGROUP.bit_length())]
        large = sum(self._flops) / self._count / 2
        candidates = [self.assign(size, large) for size in sizes if self._count % size == 0]
        best = min(candidates, key=lambda candidate: candidate.busiest, default=unsplit)
        return best if best.busiest < unsplit.busiest / BALANCED_RATIO else unsplit

    def assign(self, size: int, large: float = 0.0) -> _OwnerCandidate:
        """Assign every matrix; subgroups of `size` share those of at least `large` FLOPs."""
        subgroups: list[_GroupRanks] = [()] * len(self.keys)
        loads = [0.0] * self._count
        for i, owner in self._fixed.items():
            subgroups[i] = (owner,)
            loads[owner] += self._flops[i]
        if size > 1:
            self._assign_to_subgroups(size, large, subgroups, loads)
        heap = [(load, group_rank) for group_rank, load in enumerate(loads)]
        heapq.heapify(heap)
        for i in self._order:
            if subgroups[i]:
                continue
            n, matrix, shape = self.keys[i]
            while heap[0][0] != loads[heap[0][1]]:  # an outdated entry
                heapq.heappop(heap)
            owner = heap[0][1]
            # Stay on a rank that holds the whole matrix, unless moving it saves more than it costs.
            home = min(self._homes[n].get(matrix, ()), key=lambda p: (loads[p], p), default=None)
            moving = 2 * math.prod(shape) * self._flops_per_element
            if home is not None and loads[home] <= loads[owner] + moving:
                owner = home
            subgroups[i] = (owner,)
            loads[owner] += self._flops[i]
            heapq.heappush(heap, (loads[owner], owner))
        return _OwnerCandidate(size, subgroups, max(loads))

    def _assign_to_subgroups(
        self, size: int, large: float, subgroups: list[_GroupRanks], loads: list[float]
    ) -> None:
        """Assign large matrices to subgroups if that reduces the work."""
        heap = [(0.0, first) for first in range(0, self._count, size)]
        for i in self._order:
            if subgroups[i] or self._flops[i] < large:
                continue
            split = self._split(self.keys[i], size)
            if split is None or split[0] >= self._flops[i]:
                continue
            load, first = heapq.heappop(heap)
            subgroups[i] = tuple(range(first, first + size))
            heapq.heappush(heap, (load + split[0], first))
        for load, first in heap:
            for group_rank in range(first, first + size):
                loads[group_rank] += load

    def _split(self, key: _Key, size: int) -> tuple[float, tuple[int, ...], bool] | None:
        """Return (cost of a member, segments, divided), or None if the matrix cannot be split."""
        n, matrix, shape = key
        parameter = self._parameters[n]
        if not parameter.forms or parameter.sharding.partitioned or min(shape) < size:
            return None
        cost, segments, divided = best_split(
            shape, parameter.triples, parameter.forms, size, self._flops_per_shared_element
        )
        return cost * parameter.runs(matrix), segments, divided

    def make_tasks(self, key: _Key, subgroup: _GroupRanks, round: int) -> list[MatrixTask]:
        """Return the tasks of a matrix, one for each rank of its subgroup."""
        n, matrix, shape = key
        whole = (0, shape[0]), (0, shape[1])
        if len(subgroup) == 1:
            flops = self._parameters[n].flops[matrix]
            return [MatrixTask(n, matrix, shape, subgroup[0], round, flops, *whole)]
        best = self._split(key, len(subgroup))
        assert best is not None
        _, segments, divided = best
        triples, runs = self._parameters[n].triples, self._parameters[n].runs(matrix)
        cost = split_cost(shape, triples, segments, len(subgroup), divided=divided)
        split = SubgroupSplit(subgroup, segments, divided, runs * cost.elements)
        flops = runs * cost.flops
        axis = divided_axis(shape)
        tasks = []
        for place, owner in enumerate(subgroup):
            rows = part_of(shape[0], place, len(subgroup)) if axis == "rows" else whole[0]
            columns = part_of(shape[1], place, len(subgroup)) if axis == "columns" else whole[1]
            tasks.append(MatrixTask(n, matrix, shape, owner, round, flops, rows, columns, split))
        return tasks


def _find_homes(sharding: Sharding, ranks: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Return the group ranks that hold a whole matrix, for each matrix that some rank holds."""
    if sharding.partitioned:
        return {}
    group_rank = {rank: n for n, rank in enumerate(ranks)}
    return {
        matrix: tuple(group_rank[sharding.ranks[r]] for r in replicas[0].mesh_ranks)
        for matrix, replicas in enumerate(replica_sets(sharding))
        if len(replicas) == 1
    }


def _assign_rounds(
    parameters: Sequence[ParamCost],
    keys: Sequence[_Key],
    subgroups: Sequence[_GroupRanks],
    round_bytes: int,
) -> list[int]:
    """Return the round of each matrix: split ones first, those of one kind and shape together."""
    rounds = [0] * len(keys)
    filled: dict[int, tuple[int, int]] = {}

    def order(i: int) -> tuple[bool, str, tuple[int, int], int]:
        return len(subgroups[i]) == 1, parameters[keys[i][0]].kind, keys[i][2], i

    for i in sorted(range(len(keys)), key=order):
        number, so_far = filled.get(subgroups[i][0], (0, 0))
        copies = parameters[keys[i][0]].sharding.copies
        nbytes = 4 * math.prod(keys[i][2]) * copies // len(subgroups[i])
        if so_far and so_far + nbytes > round_bytes:
            number, so_far = number + 1, 0
        rounds[i] = number
        for group_rank in subgroups[i]:
            filled[group_rank] = number, so_far + nbytes
    return rounds


@dataclass(frozen=True)
class ReplicaSet:
    """The mesh ranks that hold the same part of a matrix."""

    shard_coord: tuple[int, ...]
    """Their `shard_coordinates`."""
    mesh_ranks: tuple[int, ...]
    elements: int
    """Elements of the part."""


@functools.cache
def replica_sets(sharding: Sharding) -> tuple[tuple[ReplicaSet, ...], ...]:
    """Return the replica sets of each matrix. Together they hold the whole matrix."""
    found: list[list[ReplicaSet]] = [[] for _ in shapes_of(sharding)]
    for shard_coord, mesh_ranks in replicas_by_coord(sharding).items():
        for matrix, own in pieces_by_matrix(sharding, shard_coord).items():
            elements = sum(piece.elements for piece in own)
            found[matrix].append(ReplicaSet(shard_coord, mesh_ranks, elements))
    return tuple(map(tuple, found))


def source_mesh_rank(replicas: tuple[int, ...], owner: int, replica: int) -> int:
    """Return the mesh rank among `replicas` that sends its part to the mesh rank `owner`.

    It is the owner itself if it is one of them, and otherwise the one at index `replica`, the
    owner's `replica_index`.
    """
    return owner if owner in replicas else replicas[replica]


def replica_index(sharding: Sharding, mesh_rank: int) -> int:
    """Return the index of a mesh rank among those that hold the same shard."""
    return replicas_by_coord(sharding)[shard_coordinates(sharding, mesh_rank)].index(mesh_rank)


@functools.cache
def _boxes(sharding: Sharding) -> tuple[Tensor, ...]:
    """Return `[pieces, 5]` for each matrix: replica set, first and last row, first and last column.

    Rows are in the order of `replica_sets`, with one row for each piece.
    """
    return tuple(
        torch.tensor(
            [
                (number, *piece.rows, *piece.columns)
                for number, replicas in enumerate(sets)
                for piece in pieces_by_matrix(sharding, replicas.shard_coord)[matrix]
            ],
            device="cpu",
        )
        for matrix, sets in enumerate(replica_sets(sharding))
    )


@dataclass(frozen=True)
class Traffic:
    """Elements that each group rank exchanges in one step."""

    sent_in: list[int]
    """Elements of directions sent to the owners."""
    sent_out: list[int]
    """Elements of updates sent from the owners."""
    shared: list[int]
    """Float32 elements sent within subgroups."""
    received_in: list[int]
    received_out: list[int]

    def sent(self, group_rank: int) -> int:
        """Return the elements that a group rank sends to others, directions and updates."""
        return self.sent_in[group_rank] + self.sent_out[group_rank]

    def received(self, group_rank: int) -> int:
        """Return the elements that a group rank receives from others, directions and updates."""
        return self.received_in[group_rank] + self.received_out[group_rank]


def traffic(assignment: OwnerAssignment) -> Traffic:
    """Return the elements that each group rank sends and receives in one step."""
    sums = Traffic(*([0] * len(assignment.ranks) for _ in range(5)))
    by_rank = {rank: group_rank for group_rank, rank in enumerate(assignment.ranks)}
    # Group ranks of each parameter's mesh ranks.
    group_ranks = [[by_rank[r] for r in p.sharding.ranks] for p in assignment.parameters]
    for task in assignment.tasks:
        sharding = assignment.parameters[task.parameter].sharding
        places = group_ranks[task.parameter]
        owner = places.index(task.owner) if places[task.owner] != task.owner else task.owner
        replica = replica_index(sharding, owner)
        if task.split is not None:
            sums.shared[task.owner] += task.split.elements
        sets = replica_sets(sharding)[task.matrix]
        for replicas, elements in zip(sets, _elements(sharding, task), strict=True):
            source = source_mesh_rank(replicas.mesh_ranks, owner, replica)
            if source != owner and not sharding.partitioned:
                sums.sent_in[places[source]] += elements
                sums.received_in[task.owner] += elements
            for mesh_rank in replicas.mesh_ranks:
                if mesh_rank != owner:
                    sums.sent_out[task.owner] += elements
                    sums.received_out[places[mesh_rank]] += elements
    return sums


def row_traffic(assignment: OwnerAssignment, states: Mapping[str, int]) -> Traffic:
    """Return the same of per-row state that is sent with the matrices.

    Args:
        assignment: of matrices of which none is split; parts of split ones are counted once.
        states: number of such states, by parameter name.
    """
    parameters = tuple(
        replace(p, sharding=row_state_sharding(p.sharding)) for p in assignment.parameters
    )
    counts = [states.get(p.name, 0) * (not p.sharding.partitioned) for p in parameters]
    tasks = tuple(task for task in assignment.tasks for _ in range(counts[task.parameter]))
    return traffic(replace(assignment, parameters=parameters, tasks=tasks))


def _elements(sharding: Sharding, task: MatrixTask) -> list[int]:
    """Return the number of elements of a task that each replica set of its matrix holds."""
    sets = replica_sets(sharding)[task.matrix]
    if task.split is None:
        return [replicas.elements for replicas in sets]
    boxes = _boxes(sharding)[task.matrix]
    rows = boxes[:, 2].clamp(max=task.rows[1]) - boxes[:, 1].clamp(min=task.rows[0])
    columns = boxes[:, 4].clamp(max=task.columns[1]) - boxes[:, 3].clamp(min=task.columns[0])
    elements = rows.clamp(min=0) * columns.clamp(min=0)
    sums = torch.zeros(len(sets), dtype=torch.int64, device="cpu")
    return sums.index_add_(0, boxes[:, 0], elements).tolist()
