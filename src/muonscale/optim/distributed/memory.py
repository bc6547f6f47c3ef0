"""What a step needs besides parameters, gradients and state, on one rank: stated before it is run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from muonscale.optim.distributed.assignment import MatrixTask, OwnerAssignment
from muonscale.optim.distributed.exchange import Route, Slots, make_routes
from muonscale.optim.matrices.sharding import cut_coordinates, pieces
from muonscale.optim.newton_schulz.orthogonalize import workspace_size


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What of an optimizer's options bears on memory."""

    products: torch.dtype
    """Of Newton-Schulz."""
    wire: torch.dtype = torch.float32
    nesterov: bool = True
    post_norm: bool = False
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one rank."""

    state: int
    """One float32 value per element of the matrices, kept between steps; row states excluded."""
    transient: int
    """Most at one time within a step."""


def step_memory(plan: OwnerAssignment, position: int, options: StepOptions) -> StepMemory:
    """Return what the matrices of a plan take on one rank, for float32 state and no split ones.

    Counted are directions, what travels, batches, their updates and the workspace of
    Newton-Schulz, at the three moments of a round at which most of them are alive. What collectives
    and matrix products take within the libraries is not.
    """
    layouts = [p.layout for p in plan.parameters]
    routes = make_routes(plan, layouts, position)
    held = _held(plan, position)
    state = 4 * sum(held)
    directions = state if options.nesterov or any(x.owned for x in layouts) else 0
    rounds = [_Round(plan, position, n, routes[n], held, options) for n in range(plan.rounds)]
    return StepMemory(state, directions + max(_peaks(rounds), default=0))


def _held(plan: OwnerAssignment, position: int) -> list[int]:
    """Return the elements of every parameter's state on a rank."""
    held = []
    for number, parameter in enumerate(plan.parameters):
        layout = parameter.layout
        if layout.owned:
            own = (t for t in plan.tasks if t.parameter == number and t.owner == position)
            held.append(sum(t.shape[0] * t.shape[1] for t in own))
        else:
            seat = layout.ranks.index(plan.ranks[position])
            held.append(sum(p.elements for p in pieces(layout, cut_coordinates(layout, seat))))
    return held


class _Round:
    """Bytes of one round."""

    def __init__(
        self,
        plan: OwnerAssignment,
        position: int,
        number: int,
        route: Route,
        held: Sequence[int],
        options: StepOptions,
    ) -> None:
        wire = options.wire.itemsize
        tasks = [t for t in plan.tasks if t.round == number]
        sizes = [0] * len(plan.ranks)
        for task in tasks:
            sizes[task.owner] += task.shape[0] * task.shape[1]
        self.incoming = wire * (_away(route.collect, position) + _away(route.assemble, position))
        if route.to_all:
            self.outgoing = wire * max(sizes) * (1 + len(sizes)) * route.moves_out
        else:
            outgoing = _away(route.distribute, position) + _away(route.deliver, position)
            self.outgoing = wire * outgoing
        own = [task for task in tasks if task.owner == position]
        self.batches = 4 * sizes[position]
        self.working = _working(own, options)
        self.places = self._places(plan, route, held, options)

    @staticmethod
    def _places(
        plan: OwnerAssignment, route: Route, held: Sequence[int], options: StepOptions
    ) -> int:
        """Return the room for the updates that arrive, where directions are not theirs."""
        arriving = {slot.task.parameter for slots in route.deliver for slot in slots}
        total = 0
        for number in arriving:
            layout = plan.parameters[number].layout
            if layout.owned:
                total += 4 * torch.Size(layout.shape).numel()
            elif not options.nesterov:
                total += 4 * held[number]
        return total


def _away(slots: Slots, position: int) -> int:
    return sum(
        slot.piece.elements for p, theirs in enumerate(slots) if p != position for slot in theirs
    )


def _working(tasks: Sequence[MatrixTask], options: StepOptions) -> int:
    """Return what comes on top of the batches while a round is worked on."""
    counts: defaultdict[tuple[int, int], int] = defaultdict(int)
    for task in tasks:
        counts[task.shape] += 1
    peak = done = 0
    rounded = options.wire.itemsize < 4
    for shape, count in counts.items():
        n = count * shape[0] * shape[1]
        room = workspace_size((count, *shape), options.products, options.device)
        direction = 4 * n * rounded
        converted = 4 * n * (options.products != torch.float32)
        product = options.products.itemsize * n
        after = max(8 * n * options.post_norm, 6 * n * rounded)
        moments = product + room, product + converted, 4 * n + after
        peak = max(peak, done + direction + max(moments))
        done += 4 * n
    return peak


def _peaks(rounds: Sequence[_Round]) -> list[int]:
    peaks: list[int] = []
    for number, this in enumerate(rounds):
        following = rounds[number + 1].incoming if number + 1 < len(rounds) else 0
        before = rounds[number - 1] if number else None
        leaving = before.batches + before.outgoing if before is not None else 0
        peaks += [
            this.incoming + following + this.batches + leaving,
            following + this.batches + this.working + leaving,
            following + this.batches + this.outgoing + leaving + (before.places if before else 0),
            following + this.batches + this.outgoing + this.places,
        ]
    return peaks
