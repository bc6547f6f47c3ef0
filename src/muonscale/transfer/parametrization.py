"""Transfer of hyper-parameters from a narrow model to a wide one, for Muon and AdamW together.

base = ...                                        # the model at base width, on the meta device
groups = parameter_groups(model, lr=0.01)         # the values that are right at the base width
transfer = parametrize(model, base, groups)
transfer.scale_weights_(model)                    # once, on freshly drawn weights
optimizer = Muon(transfer.groups(groups))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from muonscale.errors import ConfigError, LayoutError, nearest
from muonscale.optim.matrices.spec import MatrixSpec, matrix_shapes
from muonscale.optim.parameters.roles import Role, RoleAssignment, assign_roles
from muonscale.optim.rules import ADAMW
from muonscale.optim.rules.base import find_rule
from muonscale.optim.rules.step_inputs import named
from muonscale.transfer.apply import DEPTHS, DepthT, TransferRow
from muonscale.transfer.apply import Parametrization as Parametrization
from muonscale.transfer.constants import ForwardConstants, known_constants
from muonscale.transfer.fields import check_fields, depth_ratio
from muonscale.transfer.folds import Fold, Folds, depth_folds, ends_branch, width_folds
from muonscale.transfer.multipliers import (
    ConventionT,
    UpdateRule,
    check_convention,
    fold_in,
    multipliers,
    round_multipliers,
)
from muonscale.transfer.pair import Pair, counterparts, template

_DEFAULTS = {"scale": "rms", "rms": 0.2, "post_norm": None, "decay": "coupled", "eps": 1e-8}
"""Of `Muon`, as far as they matter here."""
Batch = tuple[int, int, int]
"""(number, out, in) of logical matrices that a parameter holds."""


def parametrize(
    model: nn.Module,
    base: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    *,
    convention: ConventionT = "spectral",
    depth: DepthT = "none",
    constants: ForwardConstants | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Parametrization:
    """Return how the hyper-parameters of `model` follow from those that are right for `base`.

    Per parameter `multipliers` of its logical matrices, and on top what has to be folded in of
    factors that the forward pass lacks (`muonscale.transfer.folds`). The model is not touched.

    Args:
        model: a transformers causal language model of a known architecture, or any module with
            `constants`; on any device, sharded or not.
        base: the same at base width and depth; the meta device is enough. Layers are matched by
            name, those that the base has not with a layer of the same parameters.
        groups: of `model`, from `parameter_groups`: they say the rule of every parameter. A parameter
            in none is frozen; its initial weight is scaled all the same.
        convention: "spectral", "adam_table" (of *Practical Efficiency of Muon*) or "standard", which
            is 1 everywhere; see `multipliers`.
        depth: "complete_p" divides residual branches by layers/base layers, and eps of what is in
            them too; "none" leaves depth out.
        constants: what the forward pass does with the width, for a model that is not known.
        defaults: options for `Muon`, such as `scale`, where groups have none of their own.

    Raises:
        ConfigError: for what is not understood: an architecture, a parameter without counterpart,
            configurations that differ in more than width and depth, matrices of one parameter that
            would need different multipliers, a factor with nothing to fold it into.

    References:
        See `multipliers` and `muonscale.transfer.folds`.
    """
    check_convention(convention)
    if depth not in DEPTHS:
        raise ConfigError(f"no depth rule is called {depth!r}: {nearest(depth, DEPTHS)}")
    check_fields(model, base)
    found, known = {a.name: a for a in assign_roles(model)}, {**_DEFAULTS, **(defaults or {})}
    known = {name: known[name] for name in _DEFAULTS}
    constants = constants or known_constants(model)
    base_of = counterparts({a.name: a for a in assign_roles(base)})
    pair = Pair(model=model, base=base, found=found, base_of=base_of, constants=constants)
    layers = depth_ratio(model, base) if depth == "complete_p" else 1.0
    folds = (
        {} if convention == "standard" else _merged(width_folds(pair), depth_folds(pair, layers))
    )
    homes = {name: group for group in groups for name, _ in named(group)}
    rows = {}
    for name in found:
        group = homes.get(name, {"rule": ADAMW.name})
        row = _row_of(pair, name, group, UpdateRule.of(group, known), convention)
        rows[name] = _deepened(
            _with_folds(row, folds.get(name, []), group, known), pair, layers, convention
        )
    return Parametrization(convention=convention, depth=depth, rows=rows, defaults=known)


def _merged(*parts: Folds) -> Folds:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: [fold for part in parts for fold in part.get(name, [])] for name in names}


def _row_of(
    pair: Pair, name: str, group: Mapping[str, Any], rule: UpdateRule, convention: ConventionT
) -> TransferRow:
    """Return the row of a parameter by its shape alone."""
    own, other = pair.found[name], pair.base_of(name)
    role = Role(group.get("role", own.role))
    layout = group.get("matrices", {}).get(name, own.matrices)
    if layout != own.matrices and own.matrices is not None:
        raise ConfigError(
            f"{name}: an override has changed its matrices, and transfer cannot know those of the base "
            "width; leave it out"
        )
    shapes = _shapes(own, role, layout)
    bases = _shapes(other, role, layout if own.matrices is None else other.matrices)
    if [number for number, *_ in shapes] != [number for number, *_ in bases]:
        raise ConfigError(
            f"{name} holds (number, out, in) {shapes}, and {bases} at the base width: their number has "
            "to be the same"
        )
    answers = {
        multipliers(role, shape[1:], base[1:], rule, convention)
        for shape, base in zip(shapes, bases, strict=True)
    }
    if len(answers) != 1:
        raise ConfigError(
            f"{name} holds (number, out, in) {shapes}, and {bases} at the base width. These would need "
            "different multipliers, and a parameter can have one set of them: let them grow by the same factor"
        )
    return TransferRow(
        name=name,
        shape=tuple(own.parameter.shape),
        base=tuple(other.parameter.shape),
        role=str(role),
        rule=rule.rule,
        multipliers=answers.pop(),
        why="",
    )


def _shapes(found: RoleAssignment, role: Role, layout: MatrixSpec | None) -> list[Batch]:
    """Return (number, out, in) of what a parameter holds, as `multipliers` takes them."""
    shape = tuple(found.parameter.shape)
    if role == Role.EMBEDDING and len(shape) >= 2:
        return [(1, shape[-2], shape[-1])]
    if role == Role.NORM or layout is None:
        if len(shape) > 2 or (len(shape) == 2 and not found.name.endswith("bias")):
            raise ConfigError(
                f"{found.name} of shape {shape} is neither a matrix nor a vector ({found.why}): "
                "transfer does not know how it depends on the width"
                "; leave transfer out, or freeze it"
            )
        return [(1, shape[-1] if shape else 1, 1)]
    try:
        return matrix_shapes(shape, layout)
    except LayoutError as error:
        raise LayoutError(f"{found.name}: {error}") from None


def _with_folds(
    row: TransferRow, folds: list[Fold], group: Mapping[str, Any], known: Mapping[str, Any]
) -> TransferRow:
    found, rule = row.multipliers, UpdateRule.of(group, known)
    for fold in folds:
        found = fold_in(found, fold.factor, rule, offset=fold.offset)
    why = ", ".join(f"{fold.factor:.4g}: {fold.why}" for fold in folds if fold.factor != 1)
    factor = math.prod(fold.factor for fold in folds)
    return replace(row, multipliers=found, why=why, fold=factor)


def _deepened(row: TransferRow, pair: Pair, layers: float, convention: ConventionT) -> TransferRow:
    """Return a row with what depth does besides its folds, in what stands in a layer.

    The gradient of what is in a branch falls as 1/layers, and eps follows it. And where the last
    matrix of a branch is drawn smaller in a deeper model, the folded 1/layers holds that already.
    """
    if layers == 1 or template(row.name) == row.name or convention == "standard":
        return row
    found = row.multipliers
    if not find_rule(row.rule).on_matrices and convention == "spectral":
        found = replace(found, eps=found.eps / layers)
    drawn_smaller = pair.constants.falling_branch_std and row.role != Role.NORM
    if drawn_smaller and ends_branch(row.name, pair.constants):
        found = replace(found, init=found.init * layers**0.5)
    return replace(row, multipliers=round_multipliers(found))
