"""Bytes of one rank, by part.

Parameters and optimizer state are there all the time. The rest is not there together: three moments
are told apart, at which most of it is, and the most is that of the largest.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import torch

from muonscale.lab.estimate.activations import Activations
from muonscale.lab.estimate.placement import Domain, Placed
from muonscale.lab.estimate.workload import Workload
from muonscale.optim.distributed.assignment import MatrixTask, OwnerAssignment, shapes_of
from muonscale.optim.distributed.memory import StepOptions, step_memory
from muonscale.optim.matrices.batches import row_state_sharding
from muonscale.optim.matrices.sharding import Sharding, local_shape
from muonscale.optim.newton_schulz.orthogonalize import WORKSPACE_BYTES, workspace_size

PARAMETER_BYTES = 4
"""Parameters, gradients and states are float32."""

LAYERS_IN_FLIGHT = 2
"""Gathered at a time: the one that is worked on and the next."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    matrix_state: int
    elementwise_state: int
    gathered: int
    """Layers in flight and what is outside the layers, in the dtype of the passes; without FSDP the
    copies that autocast makes."""
    gathered_layer: int
    """One of these layers."""
    unreduced: int
    """Gradients of the largest layer before they are reduced, and packed."""
    activations: int
    logits: int
    step_workspace: int
    gradients_stay: bool
    """Whether gradients are there from the beginning: those of earlier micro-batches, or DDP's
    buckets. Else they come while activations go."""

    @property
    def resident(self) -> int:
        """There all the time."""
        return self.parameters + self.matrix_state + self.elementwise_state

    @property
    def moments(self) -> dict[str, dict[str, int]]:
        """What is there when the loss is computed, in the backward pass, and in the step, by part."""
        held = {"parameters": self.parameters, "gradients": self.gradients}
        held |= {"matrix_state": self.matrix_state, "elementwise_state": self.elementwise_state}
        early = held | ({} if self.gradients_stay else {"gradients": 0})
        passing = early | {"activations": self.activations}
        if not self.gradients_stay and self.gradients > self.activations:
            passing = held
        return {
            "loss": early
            | {"gathered": self.gathered - self.gathered_layer, "activations": self.activations}
            | {"logits": self.logits},
            "backward": passing | {"gathered": self.gathered, "unreduced": self.unreduced},
            "step": held | {"step_workspace": self.step_workspace},
        }

    @property
    def passes(self) -> int:
        """Most besides what is there all the time while the model runs forward and backward."""
        most = max(sum(self.moments[name].values()) for name in ("loss", "backward"))
        return most - self.resident

    @property
    def peak(self) -> int:
        """Most at one time."""
        return max(sum(parts.values()) for parts in self.moments.values())


def rank_memory(
    placed: Placed, workload: Workload, activations: Activations, kind: str, rank: int = 0
) -> RankMemory:
    """Return what a rank needs.

    Args:
        placed: the model and its optimizer.
        workload: of a step.
        activations: of a micro-batch.
        kind: of device.
        rank: global.
    """
    state = state_bytes(placed, rank)
    layer = workload.precision.itemsize * largest_layer(placed) if sharded(placed) else 0
    kept = activations.checkpointed if workload.checkpointing else activations.plain
    return RankMemory(
        parameters=parameter_bytes(placed, rank),
        gradients=gradient_bytes(placed, rank),
        matrix_state=state[True],
        elementwise_state=state[False],
        gathered=gathered_bytes(placed, workload, rank),
        gathered_layer=layer,
        unreduced=unreduced_bytes(placed, workload),
        activations=kept,
        logits=activations.logits,
        step_workspace=step_bytes(placed, kind, rank),
        gradients_stay=workload.micro_batches > 1 or placed.topology.data == "ddp",
    )


def parameter_bytes(placed: Placed, rank: int) -> int:
    """Return the bytes of the parameters on a global rank. FSDP pads all shards to the largest."""
    padded = sharded(placed)
    return PARAMETER_BYTES * sum(
        elements(layout, 0 if padded else _mesh_rank(placed, layout, rank))
        for layout in placed.layouts.values()
    )


def gradient_bytes(placed: Placed, rank: int) -> int:
    """Return the bytes of their gradients: float32, laid out as they are."""
    return parameter_bytes(placed, rank)


def state_bytes(placed: Placed, rank: int) -> dict[bool, int]:
    """Return the bytes of the optimizer state on a global rank; step counters excluded.

    By whether the rule is one on matrices.
    """
    found = {True: 0, False: 0}
    for name, layout in placed.layouts.items():
        if not layout.partitioned:
            held = elements(layout, _mesh_rank(placed, layout, rank))
            found[placed.rules[name].on_matrices] += PARAMETER_BYTES * placed.values[name] * held
    for domain in placed.matrices:
        found[True] += PARAMETER_BYTES * _owned(domain, placed, rank)
        found[True] += PARAMETER_BYTES * _row_states(domain, placed, rank)
    for domain in placed.partitioned:
        found[False] += PARAMETER_BYTES * _owned(domain, placed, rank)
    return found


def elements(layout: Sharding, mesh_rank: int) -> int:
    """Return how many elements of a parameter a mesh rank holds."""
    return math.prod(local_shape(layout, mesh_rank))


def sharded(placed: Placed) -> bool:
    """Return whether FSDP gathers parameters and scatters gradients."""
    return placed.topology.data != "ddp" and placed.topology.data_ranks > 1


def shard_ranks(placed: Placed, name: str) -> int:
    """Return over how many ranks FSDP shards a parameter."""
    topology = placed.topology
    if topology.expert > 1 and name in placed.stacks:
        return topology.expert_shards
    return topology.shards


def gathered_elements(placed: Placed) -> dict[str, int]:
    """Return the elements that FSDP gathers at a time, padding included, by unit."""
    found: defaultdict[str, int] = defaultdict(int)
    for name, layout in placed.layouts.items():
        found[placed.units[name]] += shard_ranks(placed, name) * elements(layout, 0)
    return dict(found)


def largest_layer(placed: Placed) -> int:
    """Return the elements of the largest layer that FSDP gathers, padding included."""
    return max(size for unit, size in gathered_elements(placed).items() if unit)


def gathered_bytes(placed: Placed, workload: Workload, rank: int) -> int:
    """Return the bytes of parameters in the dtype of the passes, besides the float32 ones."""
    itemsize = workload.precision.itemsize
    if sharded(placed):
        units = gathered_elements(placed)
        return itemsize * (units.get("", 0) + LAYERS_IN_FLIGHT * largest_layer(placed))
    copied = itemsize < PARAMETER_BYTES
    return copied * itemsize * parameter_bytes(placed, rank) // PARAMETER_BYTES


def unreduced_bytes(placed: Placed, workload: Workload) -> int:
    """Return the bytes of the gradients of the largest unit, whole and once more packed."""
    if not sharded(placed):
        return 0
    return 2 * workload.precision.itemsize * max(gathered_elements(placed).values())


def step_bytes(placed: Placed, kind: str, rank: int) -> int:
    """Return the most that an optimizer step needs at one time on a global rank.

    Of a split matrix its part is counted and Gram matrices of its short side, not what travels
    within its team.
    """
    needs = [_muon_step(domain, placed, kind, rank) for domain in placed.matrices]
    needs += [_carried_step(domain, placed, rank) for domain in placed.partitioned]
    # One direction per element; a GPU keeps the old state until the gradients are known to be finite.
    needs.append(
        PARAMETER_BYTES
        * sum(
            elements(layout, _mesh_rank(placed, layout, rank))
            * (1 if kind == "cpu" else 1 + placed.values[name])
            for name, layout in placed.layouts.items()
            if not placed.rules[name].on_matrices and not layout.partitioned
        )
    )
    return max(needs)


def _mesh_rank(placed: Placed, layout: Sharding, rank: int) -> int:
    """Return the mesh rank of a rank; all tensor-parallel ranks have shardings of equal shape."""
    return rank // (placed.topology.world // len(layout.ranks))


def _owned(domain: Domain, placed: Placed, rank: int) -> int:
    """Return the elementwise state values of the matrices that a rank owns."""
    position = domain.position(rank, placed.topology.world)
    parameters = domain.plan.parameters
    return sum(
        placed.values[parameters[task.parameter].name] * math.prod(task.shape)
        for task in domain.plan.tasks
        if task.owner == position and parameters[task.parameter].sharding.partitioned
    )


def _row_states(domain: Domain, placed: Placed, rank: int) -> int:
    found = 0
    position = domain.position(rank, placed.topology.world)
    for number, parameter in enumerate(domain.plan.parameters):
        if not (count := domain.row_states.get(parameter.name, 0)):
            continue
        if parameter.sharding.partitioned:
            own = (t for t in domain.plan.tasks if t.parameter == number and t.owner == position)
            found += count * sum(task.shape[0] for task in own)
        else:
            layout = row_state_sharding(parameter.sharding)
            found += count * elements(layout, _mesh_rank(placed, layout, rank))
    return found


def _muon_step(domain: Domain, placed: Placed, kind: str, rank: int) -> int:
    if len(domain.plan.ranks) == 1:
        return _alone(domain, kind)
    options = StepOptions(
        products=domain.products,
        comm_dtype=domain.wire,
        nesterov=domain.nesterov,
        post_norm=domain.post_norm,
        device=kind,
    )
    position = domain.position(rank, placed.topology.world)
    stated = step_memory(_in_parts(domain.plan), position, options).transient
    return stated + _gram_bytes(domain, position)


def _in_parts(plan: OwnerAssignment) -> OwnerAssignment:
    """Return a plan whose split matrices have the shape of a member's part."""
    tasks = (
        task if task.split is None else replace(task, shape=_part(task)) for task in plan.tasks
    )
    return replace(plan, tasks=tuple(tasks))


def _part(task: MatrixTask) -> tuple[int, int]:
    return task.rows[1] - task.rows[0], task.columns[1] - task.columns[0]


def _gram_bytes(domain: Domain, position: int) -> int:
    """Return what the Gram matrices of split ones take more than those of their parts alone would."""
    split = [task for task in domain.plan.tasks if task.split and task.owner == position]
    more = (min(t.shape) ** 2 - min(_part(t)) ** 2 for t in split)
    return 4 * domain.products.itemsize * max(more, default=0)


def _alone(domain: Domain, kind: str) -> int:
    """Return what a step needs on one rank: a batch of one shape, its directions and its updates."""
    counts = Counter(shape for p in domain.plan.parameters for shape in shapes_of(p.sharding))
    largest = max(torch.Size(p.sharding.shape).numel() for p in domain.plan.parameters)
    needs = []
    for shape, count in counts.items():
        most = max(WORKSPACE_BYTES // 4, largest) // math.prod(shape)
        count = max(1, min(count, most))
        batch = (2 + domain.nesterov) * PARAMETER_BYTES * count * math.prod(shape)
        needs.append(batch + workspace_size((count, *shape), domain.products, kind))
    return max(needs)


def _carried_step(domain: Domain, placed: Placed, rank: int) -> int:
    """Return what updates of dealt-out state take: a rank's own, and all as they arrive."""
    whole = sum(torch.Size(p.sharding.shape).numel() for p in domain.plan.parameters)
    return PARAMETER_BYTES * (whole + _owned(domain, placed, rank))
