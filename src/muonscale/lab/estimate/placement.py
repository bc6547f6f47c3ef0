"""The sharding of a model and its optimizer under a topology, as needed for a cost estimate.

A *rank group* is a set of parameters on the same ranks, as in
`muonscale.optim.distributed.rank_group`. With tensor parallelism, parameters that are sharded over
data-parallel ranks only form one rank group per tensor-parallel rank. These are equal, and one of
them represents all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from muonscale.lab.models.structure import decoder_layers, expert_modules, parameters_of
from muonscale.lab.parallel.placements import parameter_shardings, tensor_styles
from muonscale.lab.parallel.topology import Topology
from muonscale.optim.distributed.assignment import OwnerAssignment, shapes_of
from muonscale.optim.distributed.rank_group import Member, assign_members
from muonscale.optim.distributed.zero1 import rows_sharding
from muonscale.optim.matrices.batches import row_state_sharding
from muonscale.optim.matrices.sharding import Sharding, pieces, replicas_by_coord
from muonscale.optim.rules.base import MatrixUpdate, Rule, rule_of
from muonscale.optim.rules.step_inputs import Group, named


@dataclass(frozen=True, kw_only=True)
class RankGroupPlan:
    """A rank group: its assignment and the properties that decide its costs."""

    assignment: OwnerAssignment
    comm_dtype: torch.dtype
    products_dtype: torch.dtype
    """Dtype of Newton-Schulz; float32 for an elementwise rule."""
    nesterov: bool
    copies_before: bool
    """Whether a step keeps a copy of the direction during Newton-Schulz."""
    copies_after: bool
    """Whether a step after Newton-Schulz needs a copy of the update."""
    row_gradients: bool
    """Whether a step makes gradients of directions of rows, in place of those of the weights."""
    row_sums: int
    """Number of rows that are divided among ranks and whose sums a step needs four of."""
    element_states: int
    """Number of state values per element that are sent with the matrices."""
    row_states: Mapping[str, int]
    """Number of state values per row that are sent with the matrices, by parameter that has any."""

    periods: tuple[int, ...]
    """In every how many steps each parameter of the assignment is updated whole (MuonBP)."""
    loads: tuple[int, ...]
    """FLOPs of each group rank, as the average over steps on blocks and on whole matrices."""

    def group_rank(self, rank: int, world: int) -> int:
        """Return the position of a global rank within its rank group (all groups are equal)."""
        return rank // (world // len(self.assignment.ranks))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The sharding of parameters and optimizer state."""

    topology: Topology
    shardings: Mapping[str, Sharding]
    """Sharding of every parameter on the first tensor-parallel rank."""
    rules: Mapping[str, Rule]
    """Rule of every parameter."""
    values: Mapping[str, int]
    """State values per element of every parameter."""
    row_values: Mapping[str, int]
    """State values per row that stay on every rank that has a part of the row."""
    touched: Mapping[str, int]
    """Values read or written per element of every parameter in one step."""
    units: Mapping[str, str]
    """FSDP unit of every parameter: a layer, or "" for the rest."""
    stacks: frozenset[str]
    """Parameters of routed experts."""
    partial: frozenset[str]
    """Parameters whose gradients are summed over the tensor-parallel ranks after the backward
    pass."""
    matrices: tuple[RankGroupPlan, ...]
    """Rank groups of parameters on a matrix rule."""
    partitioned: tuple[RankGroupPlan, ...]
    """Rank groups of parameters on an elementwise rule with partitioned state (ZeRO-1)."""

    @property
    def elements(self) -> int:
        """Number of elements of all parameters."""
        return sum(torch.Size(sharding.shape).numel() for sharding in self.shardings.values())


def place(
    model: PreTrainedModel,
    groups: Sequence[Group],
    topology: Topology,
    device: str,
    *,
    rule: str | None = None,
) -> Placement:
    """Return the sharding of a model and its optimizer.

    Args:
        model: model on any device.
        groups: parameter groups of its optimizer.
        topology: arrangement of the ranks.
        device: device type that computes, `cuda` or `cpu`.
        rule: rule of all parameters, instead of those of their groups.

    Raises:
        ConfigError: for a model that cannot be sharded under the topology.
    """
    matrices = {name: spec for group in groups for name, spec in group["matrices"].items()}
    shardings = parameter_shardings(model, topology, matrices)
    # Equal shardings become one object: comparing them takes long with thousands of ranks.
    unique: dict[Sharding, Sharding] = {}
    shardings = {name: unique.setdefault(each, each) for name, each in shardings.items()}
    groups = [{**group, "rule": rule or group["rule"]} for group in groups]
    layer_of = {
        parameter: f"layer {number}"
        for number, layer in enumerate(decoder_layers(model))
        for parameter in layer.parameters()
    }
    styles = tensor_styles(model) if topology.tensor > 1 else {}
    partial = [name for name, style in styles.items() if style == "partial"]
    on_matrices = [group for group in groups if rule_of(group).on_matrices]
    elementwise = [group for group in groups if not rule_of(group).on_matrices]
    return Placement(
        topology=topology,
        shardings=shardings,
        rules={name: rule_of(group) for group in groups for name, _ in named(group)},
        values={
            name: sum(tensor.per in ("element", "matrix") for tensor in rule_of(group).state(group))
            for group in groups
            for name, _ in named(group)
        },
        row_values={
            name: sum(tensor.per == "shard_row" for tensor in rule_of(group).state(group))
            for group in groups
            for name, _ in named(group)
        },
        touched={name: rule_of(g).touched(g) for g in groups for name, _ in named(g)},
        units={name: layer_of.get(p, "") for name, p in model.named_parameters()},
        stacks=parameters_of(model, expert_modules(model)),
        partial=parameters_of(model, partial),
        matrices=tuple(plan_rank_groups(on_matrices, shardings, device)),
        partitioned=tuple(plan_rank_groups(elementwise, shardings, device)),
    )


def plan_rank_groups(
    groups: Sequence[Group], shardings: Mapping[str, Sharding], device: str
) -> Iterator[RankGroupPlan]:
    """Yield the rank groups of parameter groups, as `DistributedContext.rank_groups` creates them.

    State and parameters are float32. A parameter on an elementwise rule is in a rank group only if
    its state is partitioned.
    """
    similar: defaultdict[tuple[tuple[int, ...], torch.dtype], list[Member]] = defaultdict(list)
    for group in groups:
        update = rule_of(group).matrix_update(group)
        if update is not None:
            update = update.on_device(device)
        comm_dtype = torch.float32 if update is None else update.comm_dtype
        for name, _ in named(group):
            sharding = shardings[name]
            if update is None:
                if not sharding.partitioned:
                    continue
                sharding = rows_sharding(sharding.shape, sharding.ranks)
            member = Member(name=name, sharding=sharding, update=update)
            similar[tuple(sorted(sharding.ranks)), comm_dtype].append(member)
    # A constraint keeps the updates until all have arrived, in place of the directions.
    nesterov = any(
        group.get("nesterov") or group.get("second_moment") or rule_of(group).constraint(group)
        for group in groups
        if rule_of(group).on_matrices
    )
    by_rows = {
        name
        for group in groups
        if (constraint := rule_of(group).constraint(group)) is not None and constraint.by_rows
        for name, _ in named(group)
    }
    period_of = {
        name: rule_of(group).block_period(group) for group in groups for name, _ in named(group)
    }
    for (_, comm_dtype), members in similar.items():
        assignment, kinds = assign_members(
            members, comm_dtype=comm_dtype, dtype=torch.float32, device=device
        )
        updates = [update for update in kinds.values() if update is not None]
        periods = tuple(
            1 if p.sharding.replicated else period_of[p.name] for p in assignment.parameters
        )
        products = [update.products_dtype(torch.float32, device) for update in updates]
        yield RankGroupPlan(
            assignment=assignment,
            comm_dtype=comm_dtype,
            products_dtype=max(products, key=lambda dtype: dtype.itemsize, default=torch.float32),
            nesterov=nesterov,
            copies_before=any(update.copies_before for update in updates),
            copies_after=any(update.copies_after for update in updates),
            periods=periods,
            loads=_average_loads(assignment, {m.name: m.update for m in members}, periods, device),
            row_gradients=any(m.name in by_rows for m in members),
            row_sums=sum(
                out
                for m in members
                if m.name in by_rows and row_state_sharding(m.sharding).cuts != m.sharding.cuts
                for out, _ in shapes_of(m.sharding)
            ),
            element_states=max((len(update.element_states) for update in updates), default=0),
            row_states={
                m.name: len(m.update.row_states)
                for m in members
                if m.update and m.update.row_states
            },
        )


def _average_loads(
    assignment: OwnerAssignment,
    updates: Mapping[str, MatrixUpdate | None],
    periods: Sequence[int],
    device: str,
) -> tuple[int, ...]:
    """Return the FLOPs of each group rank, as the average over steps on blocks and others."""
    loads = [0.0] * len(assignment.ranks)
    for task in assignment.tasks:
        loads[task.owner] += task.flops / periods[task.parameter]
    group_ranks = {rank: n for n, rank in enumerate(assignment.ranks)}
    for parameter, period in zip(assignment.parameters, periods, strict=True):
        update = updates[parameter.name]
        if period == 1 or update is None:
            continue
        for coord, mesh_ranks in replicas_by_coord(parameter.sharding).items():
            here = pieces(parameter.sharding, coord)
            flops = sum(update.flops(piece.shape, torch.float32, device) for piece in here)
            for mesh_rank in mesh_ranks:
                n = group_ranks[parameter.sharding.ranks[mesh_rank]]
                loads[n] += flops * (period - 1) / period
    return tuple(map(round, loads))
