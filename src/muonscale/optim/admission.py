"""What may enter the optimizer: groups in their many spellings, options and parameters, checked."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from muonscale.errors import ConfigError, LayoutError, RoutingError, nearest
from muonscale.optim.coefficients import resolve_triples
from muonscale.optim.groups import RULES
from muonscale.optim.matrices import matrix_shapes
from muonscale.optim.orthogonalize import DTYPES
from muonscale.optim.scale import SCALES
from muonscale.optim.work import Group, named


def own_groups(params: ParamsT) -> list[Group]:
    """Return the groups as dicts of our own, so that the caller's are not written to."""
    if isinstance(params, Tensor):
        raise RoutingError("params is one tensor: give a list of tensors, or of groups")
    entries = list(params)
    if not entries:
        raise ConfigError("params is empty: the optimizer has nothing to do")
    if isinstance(entries[0], dict):
        return [dict(cast(Group, entry)) for entry in entries]
    return [{"params": entries}]


def split_names(params: Any) -> tuple[list[Tensor], list[str] | None]:
    """Return tensors and, for (name, tensor) pairs as from `named_parameters`, their names."""
    entries: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    if entries and all(isinstance(entry, tuple) for entry in entries):
        return [tensor for _, tensor in entries], [name for name, _ in entries]
    return entries, None


def check_options(options: Group) -> None:
    """Raise ConfigError for an option of a group that is unknown or outside its range."""
    resolve_triples(options["ns_coefficients"], options["ns_steps"])
    if options["rule"] not in RULES:
        raise ConfigError(
            f"no rule is called {options['rule']!r}: {nearest(options['rule'], RULES)}"
        )
    if not callable(options["scale"]) and options["scale"] not in SCALES:
        hint = nearest(str(options["scale"]), SCALES)
        raise ConfigError(f"no shape factor is called {options['scale']!r}: {hint}")
    dtype = options["ns_dtype"]
    if not isinstance(dtype, torch.dtype) and dtype not in ("auto", *DTYPES):
        raise ConfigError(f"ns_dtype is {dtype!r}: {nearest(str(dtype), ('auto', *DTYPES))}")
    for option in ("lr", "weight_decay", "rms", "eps"):
        if not options[option] >= 0:
            raise ConfigError(f"{option} is {options[option]}: it cannot be below 0")
    for option in (options["momentum"], *options["betas"]):
        if not 0 <= option < 1:
            raise ConfigError(f"momentum or beta is {option}: 0 <= x < 1 is accepted")


def check_parameter(name: str, parameter: Any, options: Group) -> None:
    """Raise RoutingError or LayoutError for a parameter on which the group's rule cannot work."""
    if not isinstance(parameter, Tensor):
        raise RoutingError(f"{name} is a {type(parameter).__name__}: tensors can be optimized")
    if not parameter.is_floating_point():
        raise RoutingError(f"{name} is {parameter.dtype}: only real floating dtypes are supported")
    if hasattr(parameter, "placements"):
        raise LayoutError(
            f"{name} is sharded (DTensor): this version updates whole parameters only"
        )
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


def warn_of_narrow_parameters(groups: list[Group]) -> None:
    """Warn once of parameters in 16 bits."""
    narrow = [name for g in groups for name, p in named(g) if p.dtype.itemsize < 4]
    if narrow:
        warnings.warn(
            f"{len(narrow)} parameters are in 16 bits (first: {narrow[0]}): weight decay and small "
            "steps are lost to rounding. Keep parameters in float32 and compute in bf16.",
            stacklevel=4,
        )
