"""The memory of one rank, in bytes by part.

Parameters and optimizer state are allocated all the time. The other parts are not allocated at the
same time: the peak is the largest sum at one of three moments, the loss, the backward pass and the
optimizer step.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import torch

from muonscale.lab.estimate.activations import Activations
from muonscale.lab.estimate.placement import Placement, RankGroupPlan
from muonscale.lab.estimate.workload import Workload
from muonscale.optim.distributed.assignment import MatrixTask, shapes_of
from muonscale.optim.distributed.memory import StepOptions, step_memory
from muonscale.optim.matrices.batches import row_state_sharding
from muonscale.optim.matrices.sharding import Sharding, local_shape
from muonscale.optim.newton_schulz.orthogonalize import WORKSPACE_BYTES, workspace_size

PARAMETER_BYTES = 4
"""Bytes of an element of parameters, gradients and states, which are float32."""

LAYERS_IN_FLIGHT = 2
"""Number of layers gathered at the same time: the current one and the next."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    matrix_state: int
    elementwise_state: int
    average: int
    """The average of the weights."""
    gathered: int
    """Gathered layers and the parameters outside of layers, in the dtype of the passes; without
    FSDP the copies that autocast makes."""
    gathered_layer: int
    """One of these layers."""
    unreduced: int
    """Gradients of the largest layer before they are reduced, and a packed copy."""
    activations: int
    logits: int
    step_workspace: int
    gradients_stay: bool
    """Whether gradients exist before the backward pass: those of earlier micro-batches, or DDP's
    buckets. Otherwise they replace activations."""

    @property
    def resident(self) -> int:
        """Bytes allocated all the time."""
        return self.parameters + self.matrix_state + self.elementwise_state + self.average

    @property
    def moments(self) -> dict[str, dict[str, int]]:
        """Bytes by part at the loss, in the backward pass, and in the optimizer step."""
        held = {"parameters": self.parameters, "gradients": self.gradients}
        held |= {"matrix_state": self.matrix_state, "elementwise_state": self.elementwise_state}
        held |= {"average": self.average} if self.average else {}
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
        """Peak of the forward and backward passes without the resident bytes."""
        most = max(sum(self.moments[name].values()) for name in ("loss", "backward"))
        return most - self.resident

    @property
    def peak(self) -> int:
        """Peak of all moments."""
        return max(sum(parts.values()) for parts in self.moments.values())


def rank_memory(
    placement: Placement, workload: Workload, activations: Activations, device: str, rank: int = 0
) -> RankMemory:
    """Return the memory of a rank.

    Args:
        placement: sharding of the model and its optimizer.
        workload: work of a step.
        activations: activations of a micro-batch.
        device: device type.
        rank: global rank.
    """
    state = state_bytes(placement, rank)
    layer = workload.precision.itemsize * largest_layer(placement) if sharded(placement) else 0
    parameters = parameter_bytes(placement, rank)
    return RankMemory(
        parameters=parameters,
        gradients=parameters,
        matrix_state=state[True],
        elementwise_state=state[False],
        average=parameters if workload.averages else 0,
        gathered=gathered_bytes(placement, workload, rank),
        gathered_layer=layer,
        unreduced=unreduced_bytes(placement, workload),
        activations=activations.checkpointed if workload.checkpointing else activations.plain,
        logits=activations.logits,
        step_workspace=step_bytes(placement, device, rank),
        gradients_stay=workload.micro_batches > 1 or placement.topology.data == "ddp",
    )


def parameter_bytes(placement: Placement, rank: int) -> int:
    """Return the bytes of the parameters on a global rank; their gradients take as many again.

    FSDP pads all shards to the largest.
    """
    padded = sharded(placement)
    return PARAMETER_BYTES * sum(
        elements(sharding, 0 if padded else _mesh_rank(placement, sharding, rank))
        for sharding in placement.shardings.values()
    )


def state_bytes(placement: Placement, rank: int) -> dict[bool, int]:
    """Return the bytes of the optimizer state on a global rank, without step counters.

    The key is whether the rule is a matrix rule.
    """
    values = {True: 0, False: 0}
    for name, sharding in placement.shardings.items():
        if not sharding.partitioned:
            local = elements(sharding, _mesh_rank(placement, sharding, rank))
            values[placement.rules[name].on_matrices] += placement.values[name] * local
        if per_row := placement.row_values[name]:
            rows = row_state_sharding(sharding)
            local = elements(rows, _mesh_rank(placement, rows, rank))
            values[placement.rules[name].on_matrices] += per_row * local
    for group in placement.matrices:
        values[True] += _owned_values(group, placement, rank)
        group_rank = group.group_rank(rank, placement.topology.world)
        for number, parameter in enumerate(group.assignment.parameters):
            if not (per_row := group.row_states.get(parameter.name, 0)):
                continue
            if parameter.sharding.partitioned:
                tasks = (t for t in group.assignment.tasks if t.parameter == number)
                rows = sum(task.shape[0] for task in tasks if task.owner == group_rank)
            else:
                sharding = row_state_sharding(parameter.sharding)
                rows = elements(sharding, _mesh_rank(placement, sharding, rank))
            values[True] += per_row * rows
    for group in placement.partitioned:
        values[False] += _owned_values(group, placement, rank)
    return {key: PARAMETER_BYTES * count for key, count in values.items()}


def _owned_values(group: RankGroupPlan, placement: Placement, rank: int) -> int:
    """Return the number of elementwise state values of partitioned matrices that a rank owns."""
    group_rank = group.group_rank(rank, placement.topology.world)
    parameters = group.assignment.parameters
    return sum(
        placement.values[parameters[task.parameter].name] * math.prod(task.shape)
        for task in group.assignment.tasks
        if task.owner == group_rank and parameters[task.parameter].sharding.partitioned
    )


def elements(sharding: Sharding, mesh_rank: int) -> int:
    """Return the number of elements of a parameter on a mesh rank."""
    return math.prod(local_shape(sharding, mesh_rank))


def _mesh_rank(placement: Placement, sharding: Sharding, rank: int) -> int:
    """Return the mesh rank of a rank; shards have equal shapes on all tensor-parallel ranks."""
    return rank // (placement.topology.world // len(sharding.ranks))


def sharded(placement: Placement) -> bool:
    """Return whether FSDP gathers parameters and scatters gradients."""
    return placement.topology.data != "ddp" and placement.topology.data_ranks > 1


def shard_ranks(placement: Placement, name: str) -> int:
    """Return the number of ranks over which FSDP shards a parameter."""
    topology = placement.topology
    if topology.expert > 1 and name in placement.stacks:
        return topology.expert_shards
    return topology.shards


def gathered_elements(placement: Placement) -> dict[str, int]:
    """Return the elements that FSDP gathers at a time, including padding, by unit."""
    units: defaultdict[str, int] = defaultdict(int)
    for name, sharding in placement.shardings.items():
        units[placement.units[name]] += shard_ranks(placement, name) * elements(sharding, 0)
    return dict(units)


def largest_layer(placement: Placement) -> int:
    """Return the elements of the largest layer that FSDP gathers, including padding."""
    return max(size for unit, size in gathered_elements(placement).items() if unit)


def gathered_bytes(placement: Placement, workload: Workload, rank: int) -> int:
    """Return the bytes of parameters in the dtype of the passes, beside the float32 ones."""
    itemsize = workload.precision.itemsize
    if sharded(placement):
        units = gathered_elements(placement)
        return itemsize * (units.get("", 0) + LAYERS_IN_FLIGHT * largest_layer(placement))
    copied = itemsize < PARAMETER_BYTES
    return copied * itemsize * parameter_bytes(placement, rank) // PARAMETER_BYTES


def unreduced_bytes(placement: Placement, workload: Workload) -> int:
    """Return the bytes of the gradients of the largest unit and of their packed copy."""
    if not sharded(placement):
        return 0
    return 2 * workload.precision.itemsize * max(gathered_elements(placement).values())


def step_bytes(placement: Placement, device: str, rank: int) -> int:
    """Return the peak workspace of an optimizer step on a global rank.

    Of a split matrix it counts the part of this rank and Gram matrices of its short side, but not
    the messages within its subgroup.
    """
    needs = [_matrix_step_bytes(group, placement, device, rank) for group in placement.matrices]
    for group in placement.partitioned:
        # The updates of the rank's own state, and all updates as they arrive.
        whole = sum(torch.Size(p.sharding.shape).numel() for p in group.assignment.parameters)
        needs.append(PARAMETER_BYTES * (whole + _owned_values(group, placement, rank)))
    # One direction per element. A GPU keeps the old state until it knows that gradients are finite.
    needs.append(
        PARAMETER_BYTES
        * sum(
            elements(sharding, _mesh_rank(placement, sharding, rank))
            * (1 if device == "cpu" else 1 + placement.values[name])
            for name, sharding in placement.shardings.items()
            if not placement.rules[name].on_matrices and not sharding.partitioned
        )
    )
    return max(needs)


def _matrix_step_bytes(group: RankGroupPlan, placement: Placement, device: str, rank: int) -> int:
    assignment = group.assignment
    if len(assignment.ranks) == 1:
        # A batch of matrices of one shape, its directions and its updates.
        counts = Counter(shape for p in assignment.parameters for shape in shapes_of(p.sharding))
        largest = max(torch.Size(p.sharding.shape).numel() for p in assignment.parameters)
        needs = []
        for shape, count in counts.items():
            most = max(WORKSPACE_BYTES // 4, largest) // math.prod(shape)
            count = max(1, min(count, most))
            batch = (
                (
                    2
                    + group.nesterov
                    + group.copies_before
                    + group.row_gradients
                    + 2 * group.element_states
                )
                * PARAMETER_BYTES
                * count
                * math.prod(shape)
            )
            needs.append(batch + workspace_size((count, *shape), group.products_dtype, device))
        return max(needs)
    options = StepOptions(
        products=group.products_dtype,
        comm_dtype=group.comm_dtype,
        nesterov=group.nesterov,
        pre_norm=group.copies_before,
        post_norm=group.copies_after,
        element_states=group.element_states,
        device=device,
    )
    group_rank = group.group_rank(rank, placement.topology.world)
    # Split matrices have the shape of one rank's part.
    parts = (t if t.split is None else replace(t, shape=_part_shape(t)) for t in assignment.tasks)
    step = step_memory(replace(assignment, tasks=tuple(parts)), group_rank, options)
    # The Gram matrices of split matrices are larger than those of their parts would be.
    split = [task for task in assignment.tasks if task.split and task.owner == group_rank]
    more = (min(task.shape) ** 2 - min(_part_shape(task)) ** 2 for task in split)
    gradients = group.row_gradients * sum(
        elements(p.sharding, _mesh_rank(placement, p.sharding, rank)) for p in assignment.parameters
    )
    transient = step.transient + PARAMETER_BYTES * gradients
    return transient + 4 * group.products_dtype.itemsize * max(more, default=0)


def _part_shape(task: MatrixTask) -> tuple[int, int]:
    return task.rows[1] - task.rows[0], task.columns[1] - task.columns[0]
