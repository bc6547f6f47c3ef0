"""What one optimizer step works on: the parameters with a gradient, gathered into batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

from muonscale.errors import RoutingError
from muonscale.optim.coefficients import resolve
from muonscale.optim.layout import Layout
from muonscale.optim.matrices import PLAIN, Matrices
from muonscale.optim.muon_rule import WIRE_DTYPES, Polar
from muonscale.optim.orthogonalize import WORKSPACE_BYTES
from muonscale.optim.stacks import known_shapes

Group = dict[str, Any]
"""One entry of `Optimizer.param_groups`."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One parameter in one step: what of it is on this rank."""

    name: str
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]
    group: Group
    placing: Layout | None = None
    """How it lies on several ranks; None where it is whole on this one."""

    @property
    def layout(self) -> Matrices:
        """How the parameter's matrices are stored."""
        return self.group["matrices"].get(self.name, PLAIN)


def named(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Return the (name, parameter) pairs of a group."""
    return zip(group["param_names"], group["params"], strict=True)


def check_names(group: Group) -> None:
    """Raise RoutingError where a group has not one name per parameter."""
    if len(group["params"]) != len(group["param_names"]):
        raise RoutingError(
            f"a group has {len(group['params'])} parameters and {len(group['param_names'])} "
            "param_names: state is kept by name"
            ", so give one name for each parameter"
        )


def by_group(items: Iterable[Item]) -> Iterator[tuple[Group, list[Item]]]:
    """Yield each group with its items, which are next to each other in `items`."""
    for _, part in groupby(items, key=lambda item: id(item.group)):
        members = list(part)
        yield members[0].group, members


def batches(items: list[Item]) -> Iterator[tuple[Polar, list[Item]]]:
    """Gather the parameters whose matrices have the same shapes, across groups, up to the cap."""
    alike: defaultdict[Any, list[Item]] = defaultdict(list)
    polars = {id(group): polar_of(group) for group, _ in by_group(items)}
    for item in items:
        shapes = known_shapes(tuple(item.parameter.shape), item.layout)
        kinds = frozenset((out, in_) for _, out, in_ in shapes)
        dtype = item.state["momentum_buffer"].dtype
        alike[polars[id(item.group)], kinds, item.parameter.device, dtype].append(item)
    for (polar, *_), members in alike.items():
        for batch in _capped(members):
            yield polar, batch


def _capped(items: list[Item]) -> Iterator[list[Item]]:
    """Cut `items` where their directions would exceed the cap; one parameter is never cut."""
    batch: list[Item] = []
    size = 0
    for item in items:
        nbytes = item.state["momentum_buffer"].nbytes
        if batch and size + nbytes > WORKSPACE_BYTES:
            yield batch
            batch = []
            size = 0
        batch.append(item)
        size += nbytes
    yield batch


def polar_of(group: Group) -> Polar:
    """Return what a group on Muon does to its momentum."""
    return Polar(
        coefficients=resolve(group["ns_coefficients"], group["ns_steps"]),
        form=group["ns_form"],
        dtype=group["ns_dtype"],
        post_norm=group["post_norm"],
        post_norm_eps=group["post_norm_eps"],
        normuon_beta2=group["normuon_beta2"],
        scale=group["scale"],
        rms=group["rms"],
        wire=WIRE_DTYPES[group["wire_dtype"]],
    )
