"""Names of the parts of a model, and how the shapes of their matrices grow with the width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

from muonscale.lab.coordcheck.tolerances import LOGITS, VECTORS
from muonscale.lab.models.attention import is_attention
from muonscale.lab.models.matrix_kinds import SHARED
from muonscale.optim.matrices.spec import PLAIN, matrix_shapes
from muonscale.optim.parameters.fused_weights import holds_experts
from muonscale.optim.parameters.roles import Role, RoleAssignment, assign_roles
from muonscale.transfer.pair import template

T = TypeVar("T")


def part_namer(model: nn.Module) -> Callable[[RoleAssignment], str]:
    """Return a function that names the part of the model that a parameter belongs to.

    Hidden matrices belong to `attention`, `experts`, `shared experts` or `feed-forward`; the part
    of any other parameter is its role.
    """
    modules = dict(model.named_modules())

    def name(a: RoleAssignment) -> str:
        if a.role == Role.NORM:
            return VECTORS
        if a.role != Role.HIDDEN:
            return str(a.role)
        path = a.name.split(".")[:-1]
        around = [modules[".".join(path[:end])] for end in range(1, len(path) + 1)]
        if any(is_attention(module) for module in around):
            return "attention"
        if any(part in SHARED for part in path):
            return "shared experts"
        if "experts" in path or any(holds_experts(module) for module in around):
            return "experts"
        return "feed-forward"

    return name


def by_place(model: nn.Module, values: Mapping[str, T]) -> dict[str, T]:
    """Return values of parameters by all names that a check has for them.

    The names are those of the parameter and of its module, with a star for every number, and
    `LOGITS` for the matrix that computes the logits. A module has the value of its first parameter.
    """
    named: dict[str, T] = {}
    for a in assign_roles(model):
        if a.name not in values:
            continue
        named[template(a.name)] = values[a.name]
        if a.role == Role.NORM:
            continue
        named.setdefault(template(a.name.rpartition(".")[0]), values[a.name])
        if a.role == Role.HEAD or len(a.aliases) > 1:
            named[LOGITS] = values[a.name]
    return named


def falling_outputs(narrow: nn.Module, wide: nn.Module, ratio: float) -> dict[str, float]:
    """Return minus half the exponent of out/in of every matrix, or 0 if out/in does not fall.

    The names are those of `by_place`.

    Args:
        narrow: the model at the smallest width; it may be on the meta device.
        wide: the model at the largest width.
        ratio: the largest width over the smallest.
    """
    others = {a.name: a for a in assign_roles(narrow)}
    falls, logits = {}, {}
    for a in assign_roles(wide):
        if a.role == Role.NORM or a.matrices is None:
            continue
        growth = _aspect(a) / _aspect(others[a.name])
        fall = max(0.0, -0.5 * math.log(growth) / math.log(ratio))
        if a.role != Role.EMBEDDING:
            falls[a.name] = fall
        elif (
            len(a.aliases) > 1
        ):  # an embedding looks up single rows; the head tied to it sums over inputs
            logits[LOGITS] = fall
    return by_place(wide, falls) | logits


def _aspect(a: RoleAssignment) -> float:
    """Return the smallest out/in of a parameter's matrices."""
    shapes = matrix_shapes(a.parameter.shape, a.matrices or PLAIN)
    return min(out / in_ for _, out, in_ in shapes)
