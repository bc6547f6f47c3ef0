"""Checks of the options of a group, and of the parameters that a rule is to update."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from muonscale.errors import ConfigError, GroupingError
from muonscale.optim.matrices.spec import matrix_shapes
from muonscale.optim.options import (
    check_at_least_0,
    check_options_given,
)
from muonscale.optim.rules.base import RULES, find_rule, rule_of
from muonscale.optim.rules.master_weights import is_narrow
from muonscale.optim.rules.step_inputs import Group

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


def check_parameter(name: str, parameter: Any, options: Group) -> None:
    """Raise GroupingError or LayoutError for a parameter on which the group's rule cannot work."""
    if not isinstance(parameter, Tensor):
        raise GroupingError(f"{name} is a {type(parameter).__name__}: parameters must be tensors")
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
    constraint = rule_of(options).constraint(options)
    if constraint is not None and constraint.keeps_norm and _is_zero(parameter):
        raise GroupingError(
            f"{name} is zero, and constraint={options['constraint']!r} keeps the norm of a matrix, so "
            "it would stay zero: initialize it otherwise, or give it an override with constraint None"
        )


def _is_zero(parameter: Tensor) -> bool:
    """Return whether all that this rank holds of a parameter is zero."""
    held = parameter.detach()
    held = held.to_local() if isinstance(held, DTensor) else held
    return not held.is_meta and held.numel() > 0 and not held.any()


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
