"""A model and its optimizer on the ranks of an arrangement, as far as costs need them.

A *domain* is the parameters on one set of ranks, as in `muonscale.optim.distributed.context`, with the plan of who
works on what. Under tensor parallelism parameters that only data-parallel ranks share form as many
domains as there are tensor-parallel ranks. They are equal, and one stands for all of them here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from muonscale.lab.models.structure import decoder_layers, expert_modules
from muonscale.lab.parallel.placements import parameter_shardings, tensor_styles
from muonscale.lab.parallel.topology import Topology
from muonscale.optim.distributed.assignment import OwnerAssignment, assign_owners
from muonscale.optim.distributed.rank_group import Member, cost_of
from muonscale.optim.distributed.zero1 import rows_sharding
from muonscale.optim.matrices.sharding import Sharding
from muonscale.optim.rules.base import Rule, rule_of
from muonscale.optim.rules.step_inputs import Group, named


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Parameters on one set of ranks, with one rule and one dtype of what travels."""

    plan: OwnerAssignment
    wire: torch.dtype
    products: torch.dtype
    """Of Newton-Schulz."""
    nesterov: bool
    post_norm: bool
    row_states: Mapping[str, int]
    """How many state values per row a parameter has, of those that have any."""

    def position(self, rank: int, world: int) -> int:
        """Return the position of a global rank, in the one of several like domains that it is in."""
        return rank // (world // len(self.plan.ranks))


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where everything lies."""

    topology: Topology
    layouts: Mapping[str, Sharding]
    """By parameter, of those of the first tensor-parallel rank."""
    rules: Mapping[str, Rule]
    """By parameter."""
    values: Mapping[str, int]
    """State values per element, by parameter."""
    units: Mapping[str, str]
    """What a parameter is gathered with under FSDP, by parameter: a layer, or "" for the rest."""
    stacks: frozenset[str]
    """Parameters of routed experts."""
    partial: frozenset[str]
    """Parameters whose gradients are summed over the tensor-parallel ranks after the backward pass."""
    matrices: tuple[Domain, ...]
    """Of parameters on a rule for matrices."""
    partitioned: tuple[Domain, ...]
    """Of parameters on an elementwise rule whose state is partitioned under data parallelism."""

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return sum(torch.Size(layout.shape).numel() for layout in self.layouts.values())


def place(
    model: PreTrainedModel,
    groups: Sequence[Group],
    topology: Topology,
    kind: str,
    *,
    rule: str | None = None,
) -> Placed:
    """Return where a model and its optimizer would lie.

    Args:
        model: on any device.
        groups: its optimizer's.
        topology: the arrangement.
        kind: of device that will work on it, `cuda` or `cpu`.
        rule: of all parameters, instead of their groups'.

    Raises:
        ConfigError: for a model that cannot be put there.
    """
    matrices = {name: held for group in groups for name, held in group["matrices"].items()}
    found = _shared(parameter_shardings(model, topology, matrices))
    groups = [{**group, "rule": rule or group["rule"]} for group in groups]
    rules = {name: rule_of(group) for group in groups for name, _ in named(group)}
    values = {name: _values(group) for group in groups for name, _ in named(group)}
    on_matrices = [group for group in groups if rule_of(group).on_matrices]
    owned = [
        name for name, layout in found.items() if layout.partitioned and not rules[name].on_matrices
    ]
    return Placed(
        topology=topology,
        layouts=found,
        rules=rules,
        values=values,
        units=_units(model),
        stacks=_stacks(model),
        partial=_partial(model, topology),
        matrices=tuple(_matrix_domains(on_matrices, found, kind)),
        partitioned=tuple(_partitioned(owned, found, kind)),
    )


def _values(group: Group) -> int:
    return sum(tensor.per == "element" for tensor in rule_of(group).state(group))


def _shared(found: Mapping[str, Sharding]) -> dict[str, Sharding]:
    """Make equal parameter_shardings one object: thousands of ranks take long to compare."""
    known: dict[Sharding, Sharding] = {}
    return {name: known.setdefault(layout, layout) for name, layout in found.items()}


def _units(model: PreTrainedModel) -> dict[str, str]:
    of_layers = {
        parameter: f"layer {number}"
        for number, layer in enumerate(decoder_layers(model))
        for parameter in layer.parameters()
    }
    return {name: of_layers.get(p, "") for name, p in model.named_parameters()}


def _stacks(model: PreTrainedModel) -> frozenset[str]:
    return frozenset(
        f"{name}.{leaf}"
        for name, module in expert_modules(model).items()
        for leaf, _ in module.named_parameters(recurse=False)
    )


def _partial(model: PreTrainedModel, topology: Topology) -> frozenset[str]:
    styles = tensor_styles(model) if topology.tensor > 1 else {}
    return frozenset(
        f"{name}.{leaf}"
        for name, style in styles.items()
        if style == "partial"
        for leaf, _ in model.get_submodule(name).named_parameters(recurse=False)
    )


def _matrix_domains(
    groups: Sequence[Group], found: Mapping[str, Sharding], kind: str
) -> Iterator[Domain]:
    """Yield a domain for each set of ranks and dtype of communication, as `DistributedContext.rank_groups`."""
    similar: defaultdict[tuple[tuple[int, ...], torch.dtype], list[Member]] = defaultdict(list)
    nesterov = any(group["nesterov"] for group in groups)
    for group in groups:
        update = rule_of(group).matrix_update(group)
        assert update is not None
        update = update.on_device(kind)
        for name, _ in named(group):
            member = Member(name=name, sharding=found[name], update=update)
            similar[tuple(sorted(found[name].ranks)), update.comm_dtype].append(member)
    for (_, wire), members in similar.items():
        yield _domain(members, wire, kind, nesterov)


def _domain(members: Sequence[Member], wire: torch.dtype, kind: str, nesterov: bool) -> Domain:
    updates = {m.update for m in members if m.update is not None}
    numbers = {update: f"kind {n:04}" for n, update in enumerate(sorted(updates, key=repr))}
    costs = [cost_of(m, numbers[m.update], torch.float32, kind) for m in members if m.update]
    dtypes = [update.products_dtype(torch.float32, kind) for update in updates]
    return Domain(
        plan=assign_owners(costs, comm_bytes=wire.itemsize),
        wire=wire,
        products=max(dtypes, key=lambda dtype: dtype.itemsize),
        nesterov=nesterov,
        post_norm=any(update.copies_after for update in updates),
        row_states={
            m.name: len(m.update.row_states) for m in members if m.update and m.update.row_states
        },
    )


def _partitioned(
    names: Sequence[str], found: Mapping[str, Sharding], kind: str
) -> Iterator[Domain]:
    if not names:
        return
    members = [
        Member(name=n, sharding=rows_sharding(found[n].shape, found[n].ranks), update=None)
        for n in names
    ]
    costs = [cost_of(member, "", torch.float32, kind) for member in members]
    yield Domain(
        plan=assign_owners(costs),
        wire=torch.float32,
        products=torch.float32,
        nesterov=False,
        post_norm=False,
        row_states={},
    )
