"""What an optimizer shares with other ranks: who holds its parameters, and what they agree on.

Parameters on the same ranks share a process group, one small message per step, and a `RankGroup`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.errors import LayoutError
from muonscale.optim.distributed.assignment import assign_owners
from muonscale.optim.distributed.consensus import (
    Presence,
    agree_on_finite,
    agree_on_presence,
    check_same,
)
from muonscale.optim.distributed.dtensor import (
    differs,
    group_of,
    local,
    local_gradient,
    sharding_of,
)
from muonscale.optim.distributed.rank_group import Member, RankGroup, cost_of
from muonscale.optim.distributed.zero1 import OwnedMatrices, rows_sharding
from muonscale.optim.matrices.sharding import Sharding
from muonscale.optim.matrices.spec import PLAIN
from muonscale.optim.rules.base import RULES, Rule, rule_of
from muonscale.optim.rules.nonfinite import FiniteCheck, check_gradients
from muonscale.optim.rules.step_inputs import Group, ParamStep, check_names, named

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class _Key:
    """What the parameters of a rank_group have in common."""

    rule: str
    ranks: Ranks
    dtype: torch.dtype
    """Of their state."""
    wire: torch.dtype
    device: torch.device


@dataclass
class _Placed:
    parameter: Tensor
    layout: Sharding | None


@dataclass
class DistributedContext:
    """All that an optimizer knows of other ranks; nothing where there are none.

    Groups and rank groups are made at the first step and remade when parameters or options change, on
    all ranks alike.
    """

    process_group: dist.ProcessGroup | None = None
    """Ranks that hold plain tensors alike, as under DistributedDataParallel."""
    compile: bool | str = False
    _placed: dict[str, _Placed] = field(default_factory=dict)
    _groups: dict[Ranks, dist.ProcessGroup] = field(default_factory=dict)
    _rank_groups: dict[_Key, RankGroup] = field(default_factory=dict)
    _owners: dict[tuple[str, int], int] = field(default_factory=dict)
    """Positions that own the state of a matrix, by parameter name and number."""
    _owned: dict[str, OwnedMatrices] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        """Whether a parameter is on other ranks too."""
        return any(placed.layout is not None for placed in self._placed.values())

    def layout(self, name: str, parameter: Tensor, group: Group) -> Sharding | None:
        """Return how a parameter lies on several ranks; None where it is on this one alone."""
        placed = self._placed.get(name)
        if placed is None or placed.parameter is not parameter:
            ranks = None
            if self.process_group is not None:
                ranks = dist.get_process_group_ranks(self.process_group)
            matrices = group["matrices"].get(name, PLAIN)
            placed = _Placed(parameter, sharding_of(name, parameter, matrices, ranks))
            self._placed[name] = placed
        return placed.layout

    def items(
        self, groups: Sequence[Group], state: Mapping[Tensor, dict[str, Any]]
    ) -> list[ParamStep]:
        """Return the parameters that take part in a step, with what of them is on this rank.

        A collective of all ranks that share one.
        """
        layouts = {
            name: self.layout(name, parameter, group)
            for group in groups
            for name, parameter in named(group)
        }
        absent = self._agreed_absent(groups, layouts)
        return list(_items(groups, state, layouts, absent))

    def _agreed_absent(
        self, groups: Sequence[Group], layouts: Mapping[str, Sharding | None]
    ) -> set[str]:
        """Return the parameters without a gradient on any of their ranks."""
        parameters = {name: p for group in groups for name, p in named(group)}
        absent = {
            n for n, layout in layouts.items() if layout is None and parameters[n].grad is None
        }
        for ranks, names in _shared(layouts).items():
            present = [_presence(parameters[name]) for name in names]
            held = [layouts[name] for name in names]
            replicated = [layout is not None and layout.replicated for layout in held]
            device = local(parameters[names[0]]).device
            taking_part = agree_on_presence(names, present, replicated, self.group(ranks), device)
            absent |= {name for name, part in zip(names, taking_part, strict=True) if not part}
        return absent

    def check_finite(self, items: Sequence[ParamStep]) -> FiniteCheck:
        """Return whether all gradients of all ranks are finite. A collective like `items`."""
        layouts = {name: placed.layout for name, placed in self._placed.items()}
        shared = _shared(layouts)
        process = dist.get_rank() if shared else 0
        check = check_gradients([i.name for i in items], [i.gradient for i in items], process)
        if not shared:
            return check
        names = sorted(name for names in shared.values() for name in names)
        return agree_on_finite(check, names, [self.group(ranks) for ranks in shared])

    def group(self, ranks: Ranks) -> dist.ProcessGroup:
        """Return the process group of these ranks; all of them have to ask for it."""
        if ranks not in self._groups:
            group = group_of(ranks)
            assert group is not None
            self._groups[ranks] = group
        return self._groups[ranks]

    def rank_groups(self, groups: Sequence[Group], rule: Rule) -> list[RankGroup]:
        """Return the rank groups of a rule's parameters, the same on all of their ranks.

        A parameter on an elementwise rule is in one only if its state is partitioned: any other
        state is sharded as the parameter is, and no update has to move.
        """
        similar: defaultdict[_Key, list[Member]] = defaultdict(list)
        for group in groups:
            if group["rule"] != rule.name:
                continue
            for member, parameter in self._members(group):
                state = torch.promote_types(parameter.dtype, torch.float32)
                wire = state
                if member.update is not None and state == torch.float32:
                    wire = member.update.comm_dtype
                ranks = tuple(sorted(member.layout.ranks))
                key = _Key(rule.name, ranks, state, wire, parameter.device)
                similar[key].append(member)
        return [self._rank_group(key, tuple(similar[key])) for key in sorted(similar, key=str)]

    def _members(self, group: Group) -> Iterator[tuple[Member, Tensor]]:
        update = rule_of(group).matrix_update(group)
        for name, parameter in named(group):
            layout = self.layout(name, parameter, group)
            if layout is not None and update is None:
                layout = (
                    rows_sharding(tuple(parameter.shape), layout.ranks) if layout.owned else None
                )
            if layout is not None:
                yield Member(name=name, layout=layout, update=update), parameter

    def assign(self, groups: Sequence[Group]) -> None:
        """Settle who owns the state of parameters that have come since the last call."""
        if self.process_group is None:
            return
        for group in groups:
            check_names(group)
        for rule in RULES:
            members = [
                (member, parameter)
                for group in groups
                if group["rule"] == rule
                for member, parameter in self._members(group)
                if member.layout.owned
            ]
            if all(member.name in self._owned for member, _ in members):
                continue
            plan = assign_owners(
                [
                    cost_of(member, rule, torch.float32, parameter.device)
                    for member, parameter in members
                ],
                owners=self._owners,
            )
            position = plan.ranks.index(dist.get_rank())
            for member, _ in members:
                self._owned.setdefault(member.name, (member.layout, ()))
            for task in plan.tasks:
                name = plan.parameters[task.parameter].name
                if (name, task.matrix) in self._owners:
                    continue
                self._owners[name, task.matrix] = task.owner
                if task.owner == position:
                    layout, here = self._owned[name]
                    self._owned[name] = layout, (*here, task.matrix)

    def owned(self, name: str) -> OwnedMatrices | None:
        """Return what of a parameter's state is here, if it is dealt out."""
        return self._owned.get(name)

    def _rank_group(self, key: _Key, members: tuple[Member, ...]) -> RankGroup:
        rank_group = self._rank_groups.get(key)
        if rank_group is None or rank_group.members != members:
            rank_group = RankGroup(
                members,
                self._owners,
                self.group(key.ranks) if len(key.ranks) > 1 else None,
                dist.get_rank(),
                wire=key.wire,
                dtype=key.dtype,
                device=key.device,
                compile=self.compile,
            )
            if len(key.ranks) > 1:
                check_same(rank_group.plan.digest, self.group(key.ranks))
            self._rank_groups[key] = rank_group
        return rank_group


def _shared(layouts: Mapping[str, Sharding | None]) -> dict[Ranks, list[str]]:
    """Return the names on each set of several ranks, from small sets to the one of all.

    Raises:
        LayoutError: where no set contains the others, so that no message reaches all.
    """
    sets: defaultdict[Ranks, list[str]] = defaultdict(list)
    for name in sorted(layouts):
        layout = layouts[name]
        if layout is not None and len(layout.ranks) > 1:
            sets[tuple(sorted(layout.ranks))].append(name)
    ordered = sorted(sets, key=lambda ranks: (len(ranks), ranks))
    if any(not set(ranks) <= set(ordered[-1]) for ranks in ordered):
        raise LayoutError(
            f"parameters lie on the ranks {' and '.join(map(str, ordered))}, none of which contains the "
            "others: put them in optimizers of their own"
        )
    return {ranks: sets[ranks] for ranks in ordered}


def _presence(parameter: Any) -> Presence:
    gradient = parameter.grad
    return Presence(gradient is not None, gradient is not None and differs(parameter, gradient))


def _items(
    groups: Sequence[Group],
    state: Mapping[Tensor, dict[str, Any]],
    layouts: Mapping[str, Sharding | None],
    absent: set[str],
) -> Iterator[ParamStep]:
    for group in groups:
        for name, parameter in named(group):
            if name in absent:
                continue
            here = local(parameter)
            if parameter.grad is None:
                gradient = torch.zeros_like(here)
            else:
                gradient = local_gradient(name, parameter, parameter.grad)
            yield ParamStep(
                name=name,
                parameter=here,
                gradient=gradient,
                state={key: local(value) for key, value in state[parameter].items()},
                group=group,
                placing=layouts[name],
            )
