"""A model and its optimizer on the ranks of an arrangement, as far as costs need them.

A *domain* is the parameters on one set of ranks, as in `muonscale.optim.distributed.context`, with the plan of who
works on what. Under tensor parallelism parameters that only data-parallel ranks share form as many
domains as there are tensor-parallel ranks, all alike: one stands for them here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from muonscale.lab.parallel.placements import decoder_layers, expert_modules, layouts, tensor_styles
from muonscale.lab.parallel.topology import Topology
from muonscale.optim.distributed.assignment import OwnerAssignment, assign_owners
from muonscale.optim.distributed.rank_group import Member, has_rows, planned
from muonscale.optim.distributed.zero1 import rows_sharding
from muonscale.optim.matrices.sharding import Sharding
from muonscale.optim.newton_schulz.orthogonalize import resolve_dtype
from muonscale.optim.rules.muon import Polar
from muonscale.optim.rules.step_inputs import Group, named, polar_of


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Parameters on one set of ranks, with one rule and one dtype of what travels."""

    plan: OwnerAssignment
    wire: torch.dtype
    products: torch.dtype
    """Of Newton-Schulz."""
    nesterov: bool
    post_norm: bool
    row_states: frozenset[str]
    """Parameters with a state value per row."""

    def position(self, rank: int, world: int) -> int:
        """Return the position of a global rank, in the one of several like domains that it is in."""
        return rank // (world // len(self.plan.ranks))


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where everything lies."""

    topology: Topology
    layouts: Mapping[str, Sharding]
    """By parameter, of those of the first tensor-parallel rank."""
    rules: Mapping[str, str]
    """`muon` or `adamw`, by parameter."""
    units: Mapping[str, str]
    """What a parameter is gathered with under FSDP, by parameter: a layer, or "" for the rest."""
    stacks: frozenset[str]
    """Parameters of routed experts."""
    partial: frozenset[str]
    """Parameters whose gradients are summed over the tensor-parallel ranks after the backward pass."""
    muon: tuple[Domain, ...]
    adamw: tuple[Domain, ...]
    """Those whose updates travel: of state that is dealt out under data parallelism."""

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
    found = _shared(layouts(model, topology, matrices))
    rules = {name: rule or group["rule"] for group in groups for name, _ in named(group)}
    on_muon = [] if rule == "adamw" else [g for g in groups if g["rule"] == "muon"]
    dealt_out = [name for name, layout in found.items() if layout.owned and rules[name] == "adamw"]
    return Placed(
        topology=topology,
        layouts=found,
        rules=rules,
        units=_units(model),
        stacks=_stacks(model),
        partial=_partial(model, topology),
        muon=tuple(_muon_domains(on_muon, found, kind)),
        adamw=tuple(_carried(dealt_out, found, kind)),
    )


def _shared(found: Mapping[str, Sharding]) -> dict[str, Sharding]:
    """Make equal layouts one object: thousands of ranks take long to compare."""
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


def _muon_domains(
    groups: Sequence[Group], found: Mapping[str, Sharding], kind: str
) -> Iterator[Domain]:
    """Yield a domain for every set of ranks and dtype of what travels, as `DistributedContext.domains`."""
    alike: defaultdict[tuple[tuple[int, ...], torch.dtype], list[Member]] = defaultdict(list)
    nesterov = any(group["nesterov"] for group in groups)
    for group in groups:
        polar = _resolved(polar_of(group), kind)
        for name, _ in named(group):
            member = Member(name=name, layout=found[name], polar=polar)
            alike[tuple(sorted(found[name].ranks)), polar.wire].append(member)
    for (_, wire), members in alike.items():
        yield _domain(members, wire, kind, nesterov)


def _domain(members: Sequence[Member], wire: torch.dtype, kind: str, nesterov: bool) -> Domain:
    polars = {m.polar for m in members if m.polar is not None}
    numbers = {polar: f"kind {n:04}" for n, polar in enumerate(sorted(polars, key=repr))}
    seen = [planned(m, numbers[m.polar], torch.float32, kind) for m in members if m.polar]
    dtypes = [resolve_dtype(polar.dtype, torch.float32, kind) for polar in polars]
    return Domain(
        plan=assign_owners(seen, wire_bytes=wire.itemsize),
        wire=wire,
        products=max(dtypes, key=lambda dtype: dtype.itemsize),
        nesterov=nesterov,
        post_norm=any(polar.post_norm is not None for polar in polars),
        row_states=frozenset(m.name for m in members if has_rows(m.polar)),
    )


def _resolved(polar: Polar, kind: str) -> Polar:
    """Say what "auto" is on a GPU, which need not be in this machine."""
    return (
        replace(polar, dtype=torch.bfloat16) if kind != "cpu" and polar.dtype == "auto" else polar
    )


def _carried(names: Sequence[str], found: Mapping[str, Sharding], kind: str) -> Iterator[Domain]:
    if not names:
        return
    members = [
        Member(name=n, layout=rows_sharding(found[n].shape, found[n].ranks), polar=None)
        for n in names
    ]
    seen = [planned(member, "adamw", torch.float32, kind) for member in members]
    yield Domain(
        plan=assign_owners(seen),
        wire=torch.float32,
        products=torch.float32,
        nesterov=False,
        post_norm=False,
        row_states=frozenset(),
    )
