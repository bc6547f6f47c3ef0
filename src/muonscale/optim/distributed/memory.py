"""Prediction of the memory of a step on one rank, besides parameters and gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from muonscale.optim.distributed.assignment import MatrixTask, OwnerAssignment
from muonscale.optim.distributed.exchange import Route, Slots, make_routes
from muonscale.optim.matrices.sharding import pieces, shard_coordinates
from muonscale.optim.newton_schulz.orthogonalize import workspace_size


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The options of an optimizer that affect memory."""

    products: torch.dtype
    """Dtype of the matrix products of Newton-Schulz."""
    comm_dtype: torch.dtype = torch.float32
    nesterov: bool = True
    pre_norm: bool = False
    post_norm: bool = False
    element_states: int = 0
    """Number of state values per element that are sent with the matrices."""
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one rank."""

    state: int
    """State kept between steps: one float32 value per matrix element, without row state."""
    transient: int
    """Peak within a step, on top of `state`."""


def step_memory(assignment: OwnerAssignment, group_rank: int, options: StepOptions) -> StepMemory:
    """Return the memory of an assignment on one rank. State is float32, and no matrix is split.

    The prediction includes directions, messages, batches, updates and the workspace of
    Newton-Schulz. It excludes memory that libraries allocate within collectives and matrix
    products.
    """
    shardings = [p.sharding for p in assignment.parameters]
    routes = make_routes(assignment, shardings, group_rank)
    held = _count_state(assignment, group_rank)
    state = 4 * sum(held)
    directions = state if options.nesterov or any(x.partitioned for x in shardings) else 0
    rounds = [
        _Round(assignment, group_rank, n, routes[n], held, options)
        for n in range(assignment.rounds)
    ]
    return StepMemory(state, directions + max(_find_peaks(rounds), default=0))


def _count_state(assignment: OwnerAssignment, group_rank: int) -> list[int]:
    """Return the number of elements of each parameter's state on a rank."""
    held = []
    for number, parameter in enumerate(assignment.parameters):
        sharding = parameter.sharding
        if sharding.partitioned:
            own = (t for t in assignment.tasks if t.parameter == number and t.owner == group_rank)
            held.append(sum(t.shape[0] * t.shape[1] for t in own))
        else:
            mesh_rank = sharding.ranks.index(assignment.ranks[group_rank])
            held.append(
                sum(p.elements for p in pieces(sharding, shard_coordinates(sharding, mesh_rank)))
            )
    return held


class _Round:
    """Bytes of one round."""

    def __init__(
        self,
        assignment: OwnerAssignment,
        group_rank: int,
        number: int,
        route: Route,
        held: Sequence[int],
        options: StepOptions,
    ) -> None:
        comm_bytes = options.comm_dtype.itemsize
        if not any(p.sharding.partitioned for p in assignment.parameters):
            comm_bytes += 4 * options.element_states
        tasks = [t for t in assignment.tasks if t.round == number]
        sizes = [0] * len(assignment.ranks)
        for task in tasks:
            sizes[task.owner] += task.shape[0] * task.shape[1]
        self.incoming = comm_bytes * (
            _count_remote(route.collect, group_rank) + _count_remote(route.assemble, group_rank)
        )
        if route.to_all:
            self.outgoing = comm_bytes * max(sizes) * (1 + len(sizes)) * route.moves_out
        else:
            outgoing = _count_remote(route.distribute, group_rank) + _count_remote(
                route.deliver, group_rank
            )
            self.outgoing = comm_bytes * outgoing
        own = [task for task in tasks if task.owner == group_rank]
        self.batches = 4 * sizes[group_rank] * (1 + options.element_states)
        self.update = _predict_update(own, options)
        self.places = self._places(assignment, route, held, options)

    @staticmethod
    def _places(
        assignment: OwnerAssignment, route: Route, held: Sequence[int], options: StepOptions
    ) -> int:
        """Return the bytes of delivered updates that cannot reuse the memory of the directions."""
        arriving = {slot.task.parameter for slots in route.deliver for slot in slots}
        total = 0
        for number in arriving:
            sharding = assignment.parameters[number].sharding
            if sharding.partitioned:
                total += 4 * torch.Size(sharding.shape).numel()
            elif not options.nesterov:
                total += 4 * held[number]
        return total


def _count_remote(slots: Slots, group_rank: int) -> int:
    return sum(
        slot.piece.elements for p, theirs in enumerate(slots) if p != group_rank for slot in theirs
    )


def _predict_update(tasks: Sequence[MatrixTask], options: StepOptions) -> int:
    """Return the peak during the update of a round, on top of the batches."""
    counts: defaultdict[tuple[int, int], int] = defaultdict(int)
    for task in tasks:
        counts[task.shape] += 1
    peak = done = 0
    rounded = options.comm_dtype.itemsize < 4
    for shape, count in counts.items():
        n = count * shape[0] * shape[1]
        workspace = workspace_size((count, *shape), options.products, options.device)
        direction = 4 * n * (rounded or options.pre_norm)
        converted = 4 * n * (options.products != torch.float32)
        product = options.products.itemsize * n
        after = max(8 * n * options.post_norm, 6 * n * rounded)
        moments = product + workspace, product + converted, 4 * n + after
        peak = max(peak, done + direction + max(moments))
        done += 4 * n
    return peak


def _find_peaks(rounds: Sequence[_Round]) -> list[int]:
    peaks: list[int] = []
    for number, this in enumerate(rounds):
        following = rounds[number + 1].incoming if number + 1 < len(rounds) else 0
        before = rounds[number - 1] if number else None
        leaving = before.batches + before.outgoing if before is not None else 0
        peaks += [
            this.incoming + following + this.batches + leaving,
            following + this.batches + this.update + leaving,
            following + this.batches + this.outgoing + leaving + (before.places if before else 0),
            following + this.batches + this.outgoing + this.places,
        ]
    return peaks
