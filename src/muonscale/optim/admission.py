"""What may enter the optimizer: groups in their many spellings, options and parameters, checked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from muonscale.errors import ConfigError, RoutingError, nearest
from muonscale.optim.coefficients import resolve
from muonscale.optim.decay import DECAYS
from muonscale.optim.flops import FORMS
from muonscale.optim.groups import RULES
from muonscale.optim.matrices import matrix_shapes
from muonscale.optim.muon_rule import WIRE_DTYPES
from muonscale.optim.normalize import resolve_post_norm
from muonscale.optim.orthogonalize import DTYPES
from muonscale.optim.scale import check_scale
from muonscale.optim.weights import MASTERS, is_narrow
from muonscale.optim.work import Group, named


def own_groups(params: ParamsT) -> list[Group]:
    """Return the groups as dicts of our own, so that the caller's are not written to."""
    if isinstance(params, Tensor):
        raise RoutingError(
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
        raise RoutingError(
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


def check_options(options: Group) -> None:
    """Raise ConfigError for an option of a group that is unknown or outside its range."""
    resolve(options["ns_coefficients"], options["ns_steps"])
    for option, accepted in (
        ("rule", RULES),
        ("decay", DECAYS),
        ("master", MASTERS),
        ("ns_form", FORMS),
        ("wire_dtype", tuple(WIRE_DTYPES)),
    ):
        _check_word(option, options[option], accepted)
    resolve_post_norm(options["post_norm"])
    check_scale(options["scale"])
    dtype = options["ns_dtype"]
    if not isinstance(dtype, torch.dtype):
        _check_word("ns_dtype", dtype, ("auto", *DTYPES))
    for option in ("lr", "weight_decay", "rms", "eps"):
        if not options[option] >= 0:
            raise ConfigError(
                f"{option} is {options[option]}: it cannot be below 0; give 0 or a number above it"
            )
    if not options["post_norm_eps"] > 0:
        raise ConfigError(
            f"post_norm_eps is {options['post_norm_eps']}: it has to be above 0, or a row of zeros "
            "would be divided by zero"
        )
    for number in (options["momentum"], options["normuon_beta2"], *options["betas"]):
        if not 0 <= number < 1:
            raise ConfigError(f"momentum or beta is {number}: 0 <= x < 1 is accepted")
    if options["decay"] == "independent" and not options["peak_lr"] > 0:
        raise ConfigError(
            'decay="independent" is weight_decay times lr/peak_lr, and peak_lr, the lr that the '
            f"group was added with, is {options['peak_lr']}: give the group an lr above 0"
        )


def check_backend(name: str) -> None:
    """Raise ConfigError for a backend that torch.compile does not have."""
    _check_word("compile", name, torch.compiler.list_backends(exclude_tags=()))


def _check_word(option: str, word: object, accepted: Sequence[str]) -> None:
    if word not in accepted:
        raise ConfigError(f"{option} is {word!r}: {nearest(word, accepted)}")


def check_parameter(name: str, parameter: Any, options: Group) -> None:
    """Raise RoutingError or LayoutError for a parameter on which the group's rule cannot work."""
    if not isinstance(parameter, Tensor):
        raise RoutingError(
            f"{name} is a {type(parameter).__name__}: tensors can be optimized, and it must be one"
        )
    if not parameter.is_floating_point():
        raise RoutingError(
            f"{name} is {parameter.dtype}: only real floating dtypes are supported"
            "; convert it, or leave it out"
        )
    if options["master"] == "stochastic" and is_narrow(parameter):
        _check_bfloat16(name, parameter)
    if options["rule"] != "muon":
        return
    shape = tuple(parameter.shape)
    if name in options["matrices"]:
        matrix_shapes(shape, options["matrices"][name])
    elif len(shape) != 2:
        raise RoutingError(
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
