"""The inputs of one optimizer step: parameters with a gradient, gathered into batches."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from muonscale.errors import GroupingError, shown
from muonscale.optim.matrices.batches import cached_matrix_shapes
from muonscale.optim.matrices.sharding import Sharding
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.newton_schulz.orthogonalize import WORKSPACE_BYTES
from muonscale.optim.rules.base import MatrixUpdate, rule_of

Group = dict[str, Any]
"""One entry of `Optimizer.param_groups`."""


@dataclass(slots=True)
class ParamStep:
    """One parameter in one step: the part of it on this rank."""

    name: str
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]
    group: Group
    sharding: Sharding | None = None
    """Sharding over several ranks; None if the parameter is whole on this rank."""

    @property
    def matrices(self) -> MatrixSpec:
        """How the parameter's matrices are stored."""
        return self.group["matrices"].get(self.name, PLAIN)


def named(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Return the (name, parameter) pairs of a group."""
    return zip(group["param_names"], group["params"], strict=True)


def check_names(group: Group) -> None:
    """Raise GroupingError if a group does not have one name per parameter, or no parameter there."""
    for key in ("params", "param_names"):
        if not isinstance(group.get(key), (list, tuple)):
            raise GroupingError(
                f"a group has as its {key} {shown(group.get(key))}: give a list; `unfreeze` and "
                "`add_param_group` add parameters"
            )
    if len(group["params"]) != len(group["param_names"]):
        raise GroupingError(
            f"a group has {len(group['params'])} parameters and {len(group['param_names'])} "
            "param_names: state is kept by name, so give one name for each parameter"
        )
    for name, parameter in named(group):
        if not isinstance(parameter, Tensor):
            raise GroupingError(
                f"{name} of a group is {shown(parameter)}, of type {type(parameter).__name__}: give a "
                "parameter"
            )


def by_group(items: Iterable[ParamStep]) -> Iterator[tuple[Group, list[ParamStep]]]:
    """Yield each group with its items, which are next to each other in `items`."""
    members: list[ParamStep] = []
    for item in items:
        if members and item.group is not members[0].group:
            yield members[0].group, members
            members = []
        members.append(item)
    if members:
        yield members[0].group, members


def by_group_and_device(items: Iterable[ParamStep]) -> Iterator[tuple[Group, list[ParamStep]]]:
    """Yield each group with its items that are next to each other and on one device."""
    for group, members in by_group(items):
        for _, part in groupby(members, key=lambda item: item.parameter.device):
            yield group, list(part)


def batches(items: list[ParamStep]) -> Iterator[tuple[MatrixUpdate, list[ParamStep]]]:
    """Gather the parameters whose matrices have the same shapes, across groups, up to the cap."""
    similar: dict[MatrixUpdate, defaultdict[Any, list[ParamStep]]] = {}
    for group, part in by_group(items):
        update = rule_of(group).matrix_update(group)
        assert update is not None
        of_update = similar.setdefault(update, defaultdict(list))
        for item in part:
            parameter = item.parameter
            kinds = _kinds(parameter.shape, item.matrices)
            wide = parameter.dtype if parameter.dtype.itemsize > 4 else torch.float32
            of_update[kinds, parameter.device, wide].append(item)
    for update, of_update in similar.items():
        for members in of_update.values():
            for batch in _capped(members):
                yield update, batch


@functools.cache
def _kinds(shape: torch.Size, matrices: MatrixSpec) -> frozenset[tuple[int, int]]:
    """Return the shapes of the matrices that a parameter holds."""
    return frozenset((out, in_) for _, out, in_ in cached_matrix_shapes(tuple(shape), matrices))


def _capped(items: list[ParamStep]) -> Iterator[list[ParamStep]]:
    """Cut `items` into batches whose directions fit the cap; a parameter is never cut."""
    batch: list[ParamStep] = []
    size = 0
    for item in items:
        nbytes = item.parameter.numel() * max(4, item.parameter.itemsize)
        if batch and size + nbytes > WORKSPACE_BYTES:
            yield batch
            batch = []
            size = 0
        batch.append(item)
        size += nbytes
    yield batch
