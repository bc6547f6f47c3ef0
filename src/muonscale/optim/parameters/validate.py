"""Checks of the options of a group, and of the parameters that a rule is to update."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from muonscale.errors import ConfigError, GroupingError
from muonscale.optim.matrices.spec import matrix_shapes
from muonscale.optim.options import (
    check_at_least_0,
    check_options_given,
    option_names,
)
from muonscale.optim.rules.base import RULES, find_rule, rule_of
from muonscale.optim.rules.master_weights import is_narrow
from muonscale.optim.rules.step_inputs import Group

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of parameters."""
GROUP_KEYS = frozenset(
    [
        "params",
        "param_names",
        "name",
        "role",
        "rule",
        "matrices",
        "why",
        "guessed",
        "peak_lr",
        "momentum_convention",
    ]
)
"""What a group may have besides options."""
OF_SCHEDULERS = frozenset(
    ["initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"]
)
"""What torch's schedulers write into groups, and groups made from another optimizer's may have."""


def check_options(options: Group) -> None:
    """Raise ConfigError for an option of a group that is unknown or outside its range."""
    find_rule(options["rule"])
    check_options_given(options)
    for rule in RULES.values():
        rule.check(options)
    check_at_least_0("peak_lr", options["peak_lr"])
    if options["decay"] == "independent" and not options["peak_lr"] > 0:
        raise ConfigError(
            'decay="independent" is weight_decay times lr/peak_lr, and peak_lr, the lr that the '
            f"group was added with, is {options['peak_lr']}: give the group an lr above 0"
        )


def check_changed_options(group: Group) -> None:
    """Raise ConfigError for an option that was removed or left its range since the group was added.

    A scheduler or a user may have changed it. With a learning rate of NaN, a step would replace all
    weights by NaN.
    """
    name = group.get("name")
    title = f"in the group {name if isinstance(name, str) else group['param_names'][:1]}"
    if missing := option_names() - group.keys():
        raise ConfigError(
            f"{title}, {sorted(missing)[0]} is missing: it was there when it was added"
        )
    try:
        check_options_given(group)
        find_rule(group["rule"])
        check_at_least_0("peak_lr", group["peak_lr"])
    except ConfigError as error:
        raise ConfigError(
            f"{title}, {error}. It was changed after the group was added, by a scheduler or by "
            "hand; the step was left out"
        ) from None


def check_parameter(name: str, parameter: Tensor, options: Group) -> None:
    """Raise GroupingError or LayoutError for a parameter on which the group's rule cannot work."""
    if parameter.dtype not in DTYPES:
        raise GroupingError(
            f"{name} is {parameter.dtype}: only real floating dtypes of 16 bits and more are "
            "supported; convert it, or leave it out"
        )
    if parameter.is_inference():
        raise GroupingError(
            f"{name} was made in torch.inference_mode, where it can only be read: make the model "
            "outside of it"
        )
    if _shares_memory(parameter):
        raise GroupingError(
            f"elements of {name} share memory (shape {tuple(parameter.shape)}, strides "
            f"{parameter.stride()}), so it cannot be updated: give it memory of its own with "
            ".contiguous()"
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
    constraint = rule_of(options).constraint(options)
    if constraint is not None and constraint.keeps_norm and _is_zero(parameter):
        raise GroupingError(
            f"{name} is zero, and constraint={options['constraint']!r} keeps the norm of a matrix, so "
            "it would stay zero: initialize it otherwise, or give it an override with constraint None"
        )


def _is_zero(parameter: Tensor) -> bool:
    """Return whether all that this rank holds of a parameter is zero."""
    held = parameter.detach()
    if hasattr(held, "to_local"):  # a DTensor, without importing it
        held = held.to_local()
    return not held.is_meta and held.numel() > 0 and not held.any()


def _shares_memory(parameter: Tensor) -> bool:
    """Return whether elements of a tensor share memory, as those of an expanded tensor do."""
    reach = 0
    pairs = zip(parameter.stride(), parameter.shape, strict=True)
    for stride, size in sorted(pair for pair in pairs if pair[1] > 1):
        if stride <= reach and parameter.numel():
            return True
        reach += (size - 1) * stride
    return False


def _check_bfloat16(name: str, parameter: Tensor) -> None:
    if parameter.dtype != torch.bfloat16:
        raise ConfigError(
            f'{name} is {parameter.dtype}: master="stochastic" rounds to bfloat16 only, '
            'master="float32" takes any dtype'
            "; use one of them"
        )


def warn_of_narrow_parameters(names: list[str]) -> None:
    """Warn of parameters in 16 bits that nothing keeps from losing small steps."""
    warnings.warn(
        f"{len(names)} parameters are in 16 bits (first: {names[0]}): weight decay and small "
        "steps are lost to rounding. Keep parameters in float32 and compute in bf16, or give "
        'master="float32" or master="stochastic".',
        stacklevel=4,
    )
