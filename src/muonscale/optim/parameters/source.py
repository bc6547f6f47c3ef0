"""The model that parameter groups were made from, and what has changed in it since."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from muonscale.errors import GroupingError
from muonscale.optim.rules.step_inputs import named


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


def check_replaced(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise GroupingError if gradients go to parameters that replaced those in `groups`.

    A layer that is replaced after the optimizer was made leaves this behind: the groups have its
    old parameters, the model trains new ones. Two cases are not errors. Where the model has all
    that are in a group, others were left out on purpose; where it has none of them and they have
    gradients, the optimizer was given to another model.
    """
    held = {id(p): name for group in groups for name, p in named(group)}  # hashing a tensor is slow
    inside = _parameters(model)
    left_out = [p for p in inside if id(p) not in held and p.grad is not None]
    if not left_out:
        return
    there = set(map(id, inside))
    gone = [name for number, name in held.items() if number not in there]
    other_model = len(gone) == len(held) and any(
        p.grad is not None for group in groups for p in group["params"]
    )
    if other_model or not gone:
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
    found: list[Tensor | None] = []
    modules: list[nn.Module | None] = [model]
    while modules:
        module = modules.pop()
        if module is not None:
            found.extend(module._parameters.values())
            modules.extend(module._modules.values())
    return [p for p in found if p is not None]
