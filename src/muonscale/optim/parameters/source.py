"""The model that parameter groups were made from, and what has changed in it since."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from muonscale.errors import GroupingError


@dataclass(frozen=True)
class GroupSource:
    """A model, held weakly, and the other arguments that `parameter_groups` was given."""

    reference: weakref.ref[nn.Module]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module | None:
        """The model, or None if it no longer exists."""
        return self.reference()


class ParameterGroups(list[dict[str, Any]]):
    """What `parameter_groups` returns: a list of groups that knows its model.

    Copies and pickles are plain lists.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], source: GroupSource) -> None:
        super().__init__(groups)
        self.source = source

    def __reduce_ex__(self, protocol: object) -> tuple[type[list[Any]], tuple[list[Any]]]:
        """Leave the model out."""
        return list, (list(self),)


def check_replaced(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise GroupingError if gradients go to parameters that replaced those in `groups`.

    This is what a resized vocabulary leaves behind when it is resized after the optimizer was made:
    the groups have the old table, the model trains a new one. Parameters that are in no group
    while the model still has all that are in one were left out on purpose.
    """
    held = {parameter for group in groups for parameter in group["params"]}
    left_out = [p for p in _parameters(model) if p.grad is not None and p not in held]
    if not left_out:
        return
    there = set(_parameters(model))
    gone = [
        name
        for group in groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if p not in there
    ]
    if not gone:
        return
    new = next(name for name, p in model.named_parameters() if p is left_out[0])
    raise GroupingError(
        f"the model no longer has {gone[0]}, which is in a group, and {new} "
        f"{tuple(left_out[0].shape)} has a gradient and is in none: it would never be updated. "
        "Parameters were replaced after the optimizer was made, as resize_token_embeddings and "
        "fully_shard do. Make a new optimizer of the model; "
        "load_state_dict(old.state_dict(), strict=False) takes over the state that fits"
    )


def _parameters(model: nn.Module) -> list[Tensor]:
    """Return all parameters, tied ones as often as they are there; `parameters()` is slower."""
    found: list[Tensor] = []
    modules = [model]
    while modules:
        module = modules.pop()
        found += [p for p in module._parameters.values() if p is not None]
        modules += [child for child in module._modules.values() if child is not None]
    return found
