"""What may enter the optimizer: groups in their many spellings, options and parameters, checked."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from muonscale.errors import ConfigError, GroupingError, nearest
from muonscale.optim.matrices.spec import matrix_shapes
from muonscale.optim.migrate.aliases import FOREIGN
from muonscale.optim.newton_schulz.coefficients import resolve
from muonscale.optim.newton_schulz.orthogonalize import DTYPES
from muonscale.optim.options import (
    check_at_least_0,
    check_options_given,
    check_word,
    option_names,
)
from muonscale.optim.parameters.groups import parameter_groups
from muonscale.optim.rules import ADAMW, MUON
from muonscale.optim.rules.base import find_rule, rule_of
from muonscale.optim.rules.master_weights import is_narrow
from muonscale.optim.rules.post_norm import resolve_post_norm
from muonscale.optim.rules.scale import check_scale
from muonscale.optim.rules.step_inputs import Group, named


def own_groups(params: ParamsT | nn.Module, adamw_lr: float | None = None) -> list[Group]:
    """Return the groups as dicts of our own, so that the caller's are not written to.

    Groups on AdamW that have no learning rate get `adamw_lr`, if there is one.
    """
    groups = _groups(params)
    if adamw_lr is not None:
        check_at_least_0("adamw_lr", adamw_lr)
        for group in groups:
            if "rule" in group and not rule_of(group).on_matrices:
                group.setdefault("lr", adamw_lr)
    return groups


def _groups(params: ParamsT | nn.Module) -> list[Group]:
    if isinstance(params, nn.Module):
        return parameter_groups(params)
    if isinstance(params, Tensor):
        raise GroupingError(
            f"params is one tensor of shape {tuple(params.shape)}: give a list of tensors, or of groups"
        )
    entries = list(params)
    if not entries:
        raise ConfigError(
            f"params is {entries}, so there is nothing to optimize: give at least one tensor or group"
        )
    if isinstance(entries[0], dict):
        groups = [dict(cast(Group, entry)) for entry in entries]
        _check_some_rule(groups)
        return groups
    return [{"params": entries}]


def _check_some_rule(groups: Sequence[Group]) -> None:
    """Refuse the groups by decay that trainers make: embeddings in them look like matrices."""
    if len(groups) > 1 and not any("rule" in group for group in groups):
        raise GroupingError(
            f"{len(groups)} groups were given and none has a `rule`, as where a trainer makes groups by "
            "weight decay: embeddings and heads would be taken for hidden matrices. Let "
            "parameter_groups(model, lr=...) make the groups (in Hugging Face's Trainer: "
            "optimizer_cls_and_kwargs=(MuonFactory, {\"lr\": ...})), or give them the rules 'muon' and "
            "'adamw'"
        )


def split_names(params: Any) -> tuple[list[Tensor], list[str] | None]:
    """Return tensors and, for (name, tensor) pairs as from `named_parameters`, their names."""
    entries: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    if entries and all(isinstance(entry, tuple) for entry in entries):
        return [tensor for _, tensor in entries], [name for name, _ in entries]
    return entries, None


GROUP_KEYS = frozenset(
    [
        "params",
        "param_names",
        "name",
        "role",
        "rule",
        "matrices",
        "why",
        "peak_lr",
        "momentum_convention",
    ]
)
"""What a group may have besides options."""
OF_SCHEDULERS = frozenset(
    ["initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"]
)
"""What torch's schedulers write into groups, and groups made from another optimizer's may have."""


def check_keys(group: Group) -> None:
    """Raise ConfigError for a key that no option has: it would change nothing."""
    for key, value in group.items():
        if key not in OF_SCHEDULERS:
            refuse_unknown(key, value, GROUP_KEYS | option_names(), "a group has")


def refuse_unknown(key: str, value: object, accepted: Collection[str], where: str) -> None:
    """Raise ConfigError for a key that is not accepted, with what to write instead."""
    if key in accepted:
        return
    if key == "use_muon":
        rule = MUON if value else ADAMW
        hint = f'give rule="{rule.name}" in the group instead'
    elif sources := [name for name, other in FOREIGN.items() if key in other.arguments]:
        hint = (
            f"it is an argument of {', '.join(sources)}; "
            f'translate_arguments("{sources[0]}", ...) says what it is here'
        )
    else:
        hint = nearest(key, accepted)
    raise ConfigError(f"{where} {key}={value!r}, which is no option of Muon: {hint}")


def check_options(options: Group) -> None:
    """Raise ConfigError for an option of a group that is unknown or outside its range."""
    find_rule(options["rule"])
    check_options_given(options)
    resolve(options["ns_coefficients"], options["ns_steps"])
    resolve_post_norm(options["post_norm"])
    check_scale(options["scale"])
    dtype = options["ns_dtype"]
    if not isinstance(dtype, torch.dtype):
        check_word("ns_dtype", dtype, ("auto", *DTYPES))
    check_at_least_0("peak_lr", options["peak_lr"])
    if options["decay"] == "independent" and not options["peak_lr"] > 0:
        raise ConfigError(
            'decay="independent" is weight_decay times lr/peak_lr, and peak_lr, the lr that the '
            f"group was added with, is {options['peak_lr']}: give the group an lr above 0"
        )


def check_parameter(name: str, parameter: Any, options: Group) -> None:
    """Raise GroupingError or LayoutError for a parameter on which the group's rule cannot work."""
    if not isinstance(parameter, Tensor):
        raise GroupingError(
            f"{name} is a {type(parameter).__name__}: tensors can be optimized, and it must be one"
        )
    if not parameter.is_floating_point():
        raise GroupingError(
            f"{name} is {parameter.dtype}: only real floating dtypes are supported"
            "; convert it, or leave it out"
        )
    if options["master"] == "stochastic" and is_narrow(parameter):
        _check_bfloat16(name, parameter)
    if not rule_of(options).on_matrices:
        return
    shape = tuple(parameter.shape)
    if name in options["matrices"]:
        matrix_shapes(shape, options["matrices"][name])
    elif len(shape) != 2:
        raise GroupingError(
            f"{name} has shape {shape} and is not one matrix: let parameter_groups(model, lr=...) "
            "make the groups, give its group the rule 'adamw', or say in the group's `matrices` "
            "which matrices it holds"
        )


def _check_bfloat16(name: str, parameter: Tensor) -> None:
    if parameter.dtype != torch.bfloat16:
        raise ConfigError(
            f'{name} is {parameter.dtype}: master="stochastic" rounds to bfloat16 only, '
            'master="float32" takes any dtype'
            "; use one of them"
        )


def warn_of_narrow_parameters(groups: list[Group]) -> None:
    """Warn once of parameters in 16 bits that nothing keeps from losing small steps."""
    plain = [g for g in groups if g["master"] == "none"]
    narrow = [name for g in plain for name, p in named(g) if is_narrow(p)]
    if narrow:
        warnings.warn(
            f"{len(narrow)} parameters are in 16 bits (first: {narrow[0]}): weight decay and small "
            "steps are lost to rounding. Keep parameters in float32 and compute in bf16, or give "
            'master="float32" or master="stochastic".',
            stacklevel=4,
        )
