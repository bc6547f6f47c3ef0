"""The distributed state of an optimizer: shardings, process groups, rank groups and owners.

Parameters on the same ranks share a process group, one small message per step, and a `RankGroup`
for each rule, dtype and device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.errors import LayoutError, MuonscaleError
from muonscale.optim.distributed.assignment import assign_owners
from muonscale.optim.distributed.consensus import (
    Presence,
    RankReport,
    agree_on_finite,
    agree_on_presence,
    agree_on_settings,
    check_same,
)
from muonscale.optim.distributed.dtensor import (
    check_gradient,
    check_local_shape,
    describe,
    group_of,
    is_sharded,
    local_gradient,
    placements_differ,
    ranks_of,
    sharding_of,
    to_local,
)
from muonscale.optim.distributed.rank_group import Member, RankGroup, cost_of
from muonscale.optim.distributed.zero1 import OwnedMatrices, rows_sharding
from muonscale.optim.matrices.sharding import Sharding
from muonscale.optim.matrices.spec import PLAIN
from muonscale.optim.options import option_names
from muonscale.optim.rules.base import RULES, Rule, rule_of
from muonscale.optim.rules.nonfinite import FiniteCheck, check_gradients
from muonscale.optim.rules.step_inputs import Group, ParamStep, check_names, named

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class _Key:
    """The common properties of the parameters of a rank group."""

    rule: str
    ranks: Ranks
    dtype: torch.dtype
    """Dtype of the state."""
    comm_dtype: torch.dtype
    device: torch.device


@dataclass
class _CachedSharding:
    """The sharding of a parameter, valid until another tensor replaces it."""

    parameter: Tensor
    sharding: Sharding | None


@dataclass
class DistributedContext:
    """The shardings, groups and owners of an optimizer. It is empty on a single process.

    Process groups and rank groups are created at the first step. They are created again, on all
    ranks, when parameters or options change.
    """

    process_group: dist.ProcessGroup | None = None
    """Group whose ranks hold identical replicas of plain tensors, as in DDP."""
    compile: bool | str = False
    nonfinite: str = "raise"
    """What a gradient that is not finite does; ranks must agree on it."""
    _cache: dict[str, _CachedSharding] = field(default_factory=dict)
    _groups: dict[Ranks, dist.ProcessGroup] = field(default_factory=dict)
    _rank_groups: dict[_Key, RankGroup] = field(default_factory=dict)
    _owners: dict[tuple[str, int], int] = field(default_factory=dict)
    """Group rank that owns the state of each matrix, by parameter name and matrix."""
    owned_matrices: dict[str, OwnedMatrices] = field(default_factory=dict)
    """Matrices whose partitioned state is on this rank, by parameter name."""

    @property
    def is_distributed(self) -> bool:
        """Whether any parameter is on more than one rank."""
        return any(cached.sharding is not None for cached in self._cache.values())

    def sharding(self, name: str, parameter: Tensor, group: Group) -> Sharding | None:
        """Return the sharding of a parameter, or None if it is on this rank only."""
        cached = self._cache.get(name)
        if cached is None or cached.parameter is not parameter:
            ranks = None
            if self.process_group is not None:
                ranks = ranks_of(self.process_group)
            matrices = group["matrices"].get(name, PLAIN)
            cached = _CachedSharding(parameter, sharding_of(name, parameter, matrices, ranks))
            self._cache[name] = cached
        return cached.sharding

    def items(
        self,
        groups: Sequence[Group],
        state: Mapping[Tensor, dict[str, Any]],
        error: MuonscaleError | None = None,
    ) -> list[ParamStep]:
        """Return the local part of each parameter that takes part in a step.

        A collective of all ranks that share a parameter.

        Args:
            groups: parameter groups of the optimizer.
            state: state of every parameter.
            error: why this rank cannot take the step, which is then raised on all ranks.
        """
        shardings = {
            name: self.sharding(name, parameter, group)
            for group in groups
            for name, parameter in named(group)
        }
        error = error or self._find_error(groups, shardings)
        if error is not None and not dist.is_initialized():
            raise error
        absent = self._agree(groups, shardings, error)
        items = []
        for group in groups:
            for name, parameter in named(group):
                if name in absent:
                    continue
                gradient, values, sharding = parameter.grad, state[parameter], shardings[name]
                if gradient is None:  # another rank has one
                    gradient = torch.zeros_like(to_local(parameter))
                elif sharding is not None:
                    gradient = local_gradient(parameter, gradient)
                if sharding is not None:
                    values = {key: to_local(value) for key, value in values.items()}
                    parameter = to_local(parameter)
                items.append(ParamStep(name, parameter, gradient, values, group, sharding))
        return items

    def _find_error(
        self, groups: Sequence[Group], shardings: Mapping[str, Sharding | None]
    ) -> MuonscaleError | None:
        """Return why a parameter or gradient of this rank cannot be used, or None."""
        shared = next((name for name, sharding in shardings.items() if sharding is not None), None)
        if shared is not None and not dist.is_initialized():
            return LayoutError(
                f"{shared} is on several ranks, and torch.distributed is not initialized any more. Make "
                "a new model and optimizer after init_process_group"
            )
        try:
            for group in groups:
                for name, parameter in named(group):
                    sharding = shardings[name]
                    if sharding is not None and is_sharded(parameter):
                        check_local_shape(name, parameter, sharding)
                    if parameter.grad is not None:
                        check_gradient(name, parameter, parameter.grad)
        except MuonscaleError as error:
            return error
        return None

    def _agree(
        self,
        groups: Sequence[Group],
        shardings: Mapping[str, Sharding | None],
        error: MuonscaleError | None,
    ) -> set[str]:
        """Return the names of the parameters that have no gradient on any of their ranks.

        Raises:
            MuonscaleError: `error`, that of another rank, or what differs between ranks.
        """
        parameters = {name: p for group in groups for name, p in named(group)}
        absent = {
            n
            for n, sharding in shardings.items()
            if sharding is None and parameters[n].grad is None
        }
        by_ranks = _names_by_ranks(shardings)
        options: dict[str, Mapping[str, object]] = {}
        for group in groups if by_ranks else ():
            options |= dict.fromkeys(group["param_names"], self._options_of(group))
        for number, (ranks, names) in enumerate(by_ranks.items(), start=1):
            present = [
                Presence(p.grad is not None, p.grad is not None and placements_differ(p, p.grad))
                for p in (parameters[name] for name in names)
            ]
            process_group, device = self.group(ranks), to_local(parameters[names[0]]).device
            try:
                agreed = agree_on_settings(
                    RankReport(
                        # the last set has all ranks, which then raise together
                        error=error if number == len(by_ranks) else None,
                        parameters={name: self._describe(name, parameters[name]) for name in names},
                        options={name: options[name] for name in names},
                    ),
                    present,
                    process_group,
                    device,
                )
                taking_part = [p.here for p in present]
                if not agreed:
                    theirs = [shardings[name] for name in names]
                    replicated = [s is not None and s.replicated for s in theirs]
                    taking_part = agree_on_presence(
                        names, present, replicated, process_group, device
                    )
            except MuonscaleError as differing:
                if number == len(by_ranks):
                    raise
                error = error or differing
                continue
            absent |= {name for name, part in zip(names, taking_part, strict=True) if not part}
        if error is not None:
            raise error
        return absent

    def _options_of(self, group: Group) -> dict[str, object]:
        """Return the options of a group that must be the same on all ranks, as comparable values."""
        keys = ["rule", "peak_lr", "momentum_convention", *sorted(option_names())]
        options = {key: _plain(group[key]) for key in keys if key in group}
        return {**options, "nonfinite": self.nonfinite}

    def _describe(self, name: str, parameter: Tensor) -> str:
        sharding = self._cache[name].sharding
        matrices = "" if sharding is None or sharding.matrices == PLAIN else f" {sharding.matrices}"
        return f"{describe(parameter)}{matrices}"

    def check_finite(self, items: Sequence[ParamStep]) -> FiniteCheck:
        """Return whether all gradients of all ranks are finite. A collective like `items`."""
        shardings = {name: cached.sharding for name, cached in self._cache.items()}
        shared = _names_by_ranks(shardings)
        process = dist.get_rank() if shared else 0
        check = check_gradients([i.name for i in items], [i.gradient for i in items], process)
        if not shared:
            return check
        names = sorted(name for names in shared.values() for name in names)
        return agree_on_finite(check, names, [self.group(ranks) for ranks in shared])

    def group(self, ranks: Ranks) -> dist.ProcessGroup:
        """Return the process group of these ranks. A collective of them, the first time.

        Raises:
            LayoutError: if it was destroyed.
        """
        if ranks not in self._groups:
            group = group_of(ranks)
            assert group is not None
            self._groups[ranks] = group
        ranks_of(self._groups[ranks])
        return self._groups[ranks]

    def check_group(self) -> None:
        """Raise LayoutError if the process group of replicas does not exist or lacks this rank."""
        if self.process_group is not None:
            ranks_of(self.process_group)

    def rank_groups(self, groups: Sequence[Group], rule: Rule) -> list[RankGroup]:
        """Return the rank groups of the parameters on a rule, the same on all of their ranks.

        Call it after `items`, which finds the shardings.

        A parameter on an elementwise rule is in a rank group only if its state is partitioned.
        Otherwise its state is sharded as the parameter is, and no update has to be sent.
        """
        if not self.is_distributed:
            return []
        similar: defaultdict[_Key, list[Member]] = defaultdict(list)
        for group in groups:
            if group["rule"] != rule.name:
                continue
            for member, parameter in self._members(group):
                state = torch.promote_types(parameter.dtype, torch.float32)
                comm_dtype = state
                if member.update is not None and state == torch.float32:
                    comm_dtype = member.update.comm_dtype
                ranks = tuple(sorted(member.sharding.ranks))
                key = _Key(rule.name, ranks, state, comm_dtype, parameter.device)
                similar[key].append(member)
        return [self._rank_group(key, tuple(similar[key])) for key in sorted(similar, key=str)]

    def _members(self, group: Group) -> Iterator[tuple[Member, Tensor]]:
        update = rule_of(group).matrix_update(group)
        for name, parameter in named(group):
            sharding = self.sharding(name, parameter, group)
            if sharding is not None and update is None:
                sharding = (
                    rows_sharding(tuple(parameter.shape), sharding.ranks)
                    if sharding.partitioned
                    else None
                )
            if sharding is not None:
                yield Member(name=name, sharding=sharding, update=update), parameter

    def assign(self, groups: Sequence[Group]) -> None:
        """Assign an owner to the state of each parameter that is new since the last call."""
        if self.process_group is None:
            return
        self.check_group()
        for group in groups:
            check_names(group)
        for rule in RULES:
            members = [
                (member, parameter)
                for group in groups
                if group["rule"] == rule
                for member, parameter in self._members(group)
                if member.sharding.partitioned
            ]
            if all(member.name in self.owned_matrices for member, _ in members):
                continue
            assignment = assign_owners(
                [
                    cost_of(member, rule, torch.float32, parameter.device)
                    for member, parameter in members
                ],
                owners=self._owners,
            )
            group_rank = assignment.ranks.index(dist.get_rank())
            for member, _ in members:
                self.owned_matrices.setdefault(member.name, (member.sharding, ()))
            for task in assignment.tasks:
                name = assignment.parameters[task.parameter].name
                if (name, task.matrix) in self._owners:
                    continue
                self._owners[name, task.matrix] = task.owner
                if task.owner == group_rank:
                    sharding, matrices = self.owned_matrices[name]
                    self.owned_matrices[name] = sharding, (*matrices, task.matrix)

    def _rank_group(self, key: _Key, members: tuple[Member, ...]) -> RankGroup:
        rank_group = self._rank_groups.get(key)
        if rank_group is None or rank_group.members != members:
            rank_group = RankGroup(
                members,
                self._owners,
                self.group(key.ranks) if len(key.ranks) > 1 else None,
                dist.get_rank(),
                comm_dtype=key.comm_dtype,
                dtype=key.dtype,
                device=key.device,
                compile=self.compile,
            )
            if len(key.ranks) > 1:
                check_same(rank_group.assignment.digest, self.group(key.ranks))
            self._rank_groups[key] = rank_group
        return rank_group


def _names_by_ranks(shardings: Mapping[str, Sharding | None]) -> dict[Ranks, list[str]]:
    """Return parameter names by the ranks that share them, from the smallest set to the largest.

    Raises:
        LayoutError: if no set contains all others, so that one message cannot reach all ranks.
    """
    sets: defaultdict[Ranks, list[str]] = defaultdict(list)
    for name in sorted(shardings):
        sharding = shardings[name]
        if sharding is not None and len(sharding.ranks) > 1:
            sets[tuple(sorted(sharding.ranks))].append(name)
    ordered = sorted(sets, key=lambda ranks: (len(ranks), ranks))
    if any(not set(ranks) <= set(ordered[-1]) for ranks in ordered):
        raise LayoutError(
            f"parameters are on the ranks {' and '.join(map(str, ordered))}, and none of these sets "
            "contains the others. Use a separate optimizer for each set of ranks"
        )
    return {ranks: sets[ranks] for ranks in ordered}


def _plain(value: object) -> object:
    """Return a value whose repr is the same in every process."""
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value))}"
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value
