"""Transfer of hyper-parameters from a narrow model to a wide one, for Muon and AdamW together.

For example:

    base = ...                                        # the model at base width, on the meta device
    groups = parameter_groups(model, lr=0.01)         # the values tuned at base width
    transfer = parametrize(model, base, groups)
    transfer.scale_weights_(model)                    # once, on newly initialized weights
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
from muonscale.transfer.apply import Parametrization as Parametrization
from muonscale.transfer.apply import TransferRow
from muonscale.transfer.constants import ForwardConstants, known_constants
from muonscale.transfer.fields import check_fields, depth_ratio
from muonscale.transfer.folds import Fold, Folds, depth_folds, ends_branch, width_folds
from muonscale.transfer.multipliers import (
    UpdateRule,
    check_convention,
    fold_in,
    multipliers,
    round_multipliers,
)
from muonscale.transfer.options import DEPTHS, ConventionT, DepthT
from muonscale.transfer.pair import Pair, match_parameters, template

_DEFAULTS = {"scale": "rms", "rms": 0.2, "post_norm": None, "decay": "coupled", "eps": 1e-8}
"""Defaults of the options of `Muon` that transfer depends on."""
Batch = tuple[int, int, int]
"""(number, out, in) of a batch of logical matrices of a parameter."""


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
    """Return the multipliers that turn the hyper-parameters of `base` into those of `model`.

    They are the `multipliers` of the logical matrices of each parameter, times the factors that the
    forward pass lacks (`muonscale.transfer.folds`). The model is not changed.

    Args:
        model: a transformers causal language model of a known architecture, or any module with
            `constants`; on any device, sharded or not.
        base: the same model at base width and depth, for example on the meta device. Layers are
            matched by name; additional layers are matched with one that has the same parameters.
        groups: parameter groups of `model`, from `parameter_groups`. A parameter in no group is
            frozen, but its initial weight is scaled too.
        convention: "spectral", "adam_table" (of *Practical Efficiency of Muon*) or "standard",
            which is 1 everywhere; see `multipliers`.
        depth: "complete_p" divides residual branches, and the eps of parameters in them, by the
            ratio of the numbers of layers; "none" ignores depth.
        constants: factors of the forward pass, for an unknown architecture.
        defaults: options of `Muon`, such as `scale`, for groups that do not set them.

    Raises:
        ConfigError: if the architecture is unknown, a parameter has no counterpart, configurations
            differ in more than width and depth, matrices of one parameter need different
            multipliers, or there is no parameter to fold a factor into.

    References:
        See `multipliers` and `muonscale.transfer.folds`.
    """
    check_convention(convention)
    if depth not in DEPTHS:
        raise ConfigError(f"no depth rule is called {depth!r}: {nearest(depth, DEPTHS)}")
    check_fields(model, base)
    found = {a.name: a for a in assign_roles(model)}
    given = {**_DEFAULTS, **(defaults or {})}
    known = {name: given[name] for name in _DEFAULTS}
    constants = constants or known_constants(model)
    base_of = match_parameters({a.name: a for a in assign_roles(base)})
    pair = Pair(model=model, base=base, found=found, base_of=base_of, constants=constants)
    layers = depth_ratio(model, base) if depth == "complete_p" else 1.0
    folds: Folds = {}
    if convention != "standard":
        folds = width_folds(pair)
        for name, more in depth_folds(pair, layers).items():
            folds.setdefault(name, []).extend(more)
    homes = {name: group for group in groups for name, _ in named(group)}
    rows = {}
    for name in found:
        group = homes.get(name, {"rule": ADAMW.name})
        row = _make_row(pair, name, group, UpdateRule.of(group, known), convention)
        rows[name] = _apply_depth(
            _apply_folds(row, folds.get(name, []), group, known), pair, layers, convention
        )
    return Parametrization(convention=convention, depth=depth, rows=rows, defaults=known)


def _make_row(
    pair: Pair, name: str, group: Mapping[str, Any], rule: UpdateRule, convention: ConventionT
) -> TransferRow:
    """Return the row that follows from the shape of a parameter."""
    own, other = pair.found[name], pair.base_of(name)
    role = Role(group.get("role", own.role))
    layout = group.get("matrices", {}).get(name, own.matrices)
    if layout != own.matrices and own.matrices is not None:
        raise ConfigError(
            f"{name}: an override, or heads='auto', makes its matrices {layout}, but those at the base "
            "width are unknown. Leave it out, or leave transfer out"
        )
    shapes = _shapes(own, role, layout)
    bases = _shapes(other, role, layout if own.matrices is None else other.matrices)
    if [number for number, *_ in shapes] != [number for number, *_ in bases]:
        raise ConfigError(
            f"{name} holds (number, out, in) {shapes}, but {bases} at the base width: the numbers "
            "must be equal"
        )
    answers = {
        multipliers(role, shape[1:], base[1:], rule, convention)
        for shape, base in zip(shapes, bases, strict=True)
    }
    if len(answers) != 1:
        raise ConfigError(
            f"{name} holds (number, out, in) {shapes}, and {bases} at the base width. They need "
            "different multipliers, but a parameter has one set: widen all of them by the same "
            "factor"
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
    """Return (number, out, in) of the batches of a parameter, as `multipliers` takes them."""
    shape = tuple(found.parameter.shape)
    if role == Role.EMBEDDING and len(shape) >= 2:
        return [(1, shape[-2], shape[-1])]
    if role == Role.NORM or layout is None:
        if len(shape) > 2 or (len(shape) == 2 and not found.name.endswith("bias")):
            raise ConfigError(
                f"{found.name} of shape {shape} is neither a matrix nor a vector ({found.why}), so "
                "its dependence on the width is unknown. Leave transfer out, or freeze the "
                "parameter"
            )
        return [(1, shape[-1] if shape else 1, 1)]
    try:
        return matrix_shapes(shape, layout)
    except LayoutError as error:
        raise LayoutError(f"{found.name}: {error}") from None


def _apply_folds(
    row: TransferRow, folds: list[Fold], group: Mapping[str, Any], known: Mapping[str, Any]
) -> TransferRow:
    found, rule = row.multipliers, UpdateRule.of(group, known)
    for fold in folds:
        found = fold_in(found, fold.factor, rule, offset=fold.offset)
    why = ", ".join(f"{fold.factor:.4g}: {fold.why}" for fold in folds if fold.factor != 1)
    factor = math.prod(fold.factor for fold in folds)
    return replace(row, multipliers=found, why=why, fold=factor)


def _apply_depth(
    row: TransferRow, pair: Pair, layers: float, convention: ConventionT
) -> TransferRow:
    """Return the row of a parameter in a layer with the effects of depth other than its folds.

    The gradient in a branch falls as 1/layers, and eps follows it. If the last matrix of a branch
    is initialized smaller in a deeper model, the folded 1/layers includes that already.
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
