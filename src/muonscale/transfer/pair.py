"""A model and the same model at base width, and how their parameters correspond."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from muonscale.errors import ConfigError
from muonscale.optim.parameters.roles import RoleAssignment
from muonscale.transfer.constants import ForwardConstants


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model and the same model at base width and depth."""

    model: nn.Module
    base: nn.Module
    found: dict[str, RoleAssignment]
    """Parameters of the model by name."""
    base_of: Callable[[str], RoleAssignment]
    """Returns the counterpart of a parameter of the model, by its name."""
    constants: ForwardConstants


def match_parameters(base: dict[str, RoleAssignment]) -> Callable[[str], RoleAssignment]:
    """Return a function that finds the counterpart of a parameter: by name, or in any other layer.

    It raises ConfigError if there is none, or if layers of the base differ in its shape.
    """
    similar: dict[str, list[RoleAssignment]] = {}
    for name, assignment in base.items():
        similar.setdefault(template(name), []).append(assignment)

    def find(name: str) -> RoleAssignment:
        if name in base:
            return base[name]
        others = similar.get(template(name), [])
        shapes = {tuple(other.parameter.shape) for other in others}
        if len(shapes) != 1:
            raise ConfigError(
                f"{name} has no counterpart at the base width: {len(shapes)} shapes match it. Give "
                "a base that differs only in width and depth"
            )
        return others[0]

    return find


def template(name: str) -> str:
    """Return the name with a star in place of every number."""
    return re.sub(r"\b\d+\b", "*", name)
