"""A model and the same model at base width: which part of the one is which part of the other."""

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
    """A model and the same model at base width and depth, part by part."""

    model: nn.Module
    base: nn.Module
    found: dict[str, RoleAssignment]
    """Parameters of the model, by name."""
    base_of: Callable[[str], RoleAssignment]
    """From the name of a parameter of the model to its counterpart."""
    constants: ForwardConstants


def counterparts(base: dict[str, RoleAssignment]) -> Callable[[str], RoleAssignment]:
    """Return what finds a parameter's counterpart: by name, else in any layer that has one."""
    similar: dict[str, list[RoleAssignment]] = {}
    for name, assignment in base.items():
        similar.setdefault(template(name), []).append(assignment)

    def counterpart(name: str) -> RoleAssignment:
        if name in base:
            return base[name]
        others = similar.get(template(name), [])
        shapes = {tuple(other.parameter.shape) for other in others}
        if len(shapes) != 1:
            what = f"{len(shapes)} kinds of them" if shapes else "nothing like it"
            raise ConfigError(
                f"{name} has no counterpart at the base width: there is {what}"
                "; give a base that differs in width and depth alone"
            )
        return others[0]

    return counterpart


def template(name: str) -> str:
    """Return the name with a star for every number."""
    return re.sub(r"\b\d+\b", "*", name)
