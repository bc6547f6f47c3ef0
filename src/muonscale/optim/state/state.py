"""The state of each parameter. It exists from the construction of the optimizer on.

| key                    | rule                | shape           | dtype                                   |
|------------------------|---------------------|-----------------|-----------------------------------------|
| momentum_buffer        | muon                | the parameter's | float32; float64 for float64 parameters |
| gradient_second_moment | muon, second_moment | the parameter's | as above                                |
| update_second_moment   | muon, second_moment | the parameter's | as above                                |
| row_second_moment      | muon, normuon       | one per row     | as above                                |
| row_skipped            | muon, row_fraction  | one per row     | as above                                |
| block_step             | muon, block_period  | 0-D, on the CPU | float32                                 |
| row_magnitude          | muon, row_magnitude | one per row     | as above                                |
| row_direction_length   | muon, row_magnitude | one per row     | as above                                |
| row_exp_avg            | muon, row_magnitude | one per row     | as above                                |
| row_exp_avg_sq         | muon, row_magnitude | one per row     | as above                                |
| row_step               | muon, row_magnitude | 0-D, on the CPU | float32                                 |
| exp_avg, exp_avg_sq    | adamw               | the parameter's | as above                                |
| step                   | adamw               | 0-D, on the CPU | float32                                 |
| master                 | both, 16 bits       | the parameter's | float32, with master="float32"          |
| rounding_step          | both, 16 bits       | 0-D, on the CPU | float32, with master="stochastic"       |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor

from muonscale.errors import LayoutError
from muonscale.optim.distributed.dtensor import sharding_of, zeros_with_sharding
from muonscale.optim.distributed.zero1 import OwnedMatrices, copy_, partitioned_zeros
from muonscale.optim.matrices.batches import row_state_shape, row_state_sharding
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.parameters.validate import check_parameter
from muonscale.optim.rules.base import rule_of
from muonscale.optim.rules.master_weights import is_narrow
from muonscale.optim.rules.step_inputs import Group, check_names, named


def counters_of(group: Group) -> list[str]:
    """Return the names of the state that counts the steps of a parameter. A cancelled step does not
    count."""
    of_rule = [t.name for t in rule_of(group).state(group) if t.per == "parameter"]
    return of_rule + (["rounding_step"] if group["master"] == "stochastic" else [])


def not_negative_state(group: Group) -> list[str]:
    """Return the names of the state that is never negative: second moments and counts."""
    return [t.name for t in rule_of(group).state(group) if not t.negative] + counters_of(group)


def new_state(
    name: str, parameter: Tensor, options: Mapping[str, Any], owned: OwnedMatrices | None = None
) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step.

    Args:
        name: name of the parameter.
        parameter: a tensor of any floating dtype, on any device.
        options: complete options of its group.
        owned: sharding and owned matrices if the state is partitioned, or None.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)

    def zeros() -> Tensor:
        if owned is not None:
            return partitioned_zeros(tuple(parameter.shape), owned, dtype, parameter.device)
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)

    state: dict[str, Tensor] = {}
    for tensor in rule_of(options).state(options):
        if tensor.per in ("element", "matrix"):
            state[tensor.name] = zeros()
        elif tensor.per in ("row", "shard_row"):
            matrices = options["matrices"].get(name, PLAIN)
            owner = owned if tensor.per == "row" else None
            state[tensor.name] = _row_state(name, parameter, matrices, owner, dtype)
        else:
            state[tensor.name] = torch.tensor(0.0, device="cpu")
    if is_narrow(parameter) and options["master"] == "float32":
        state["master"] = parameter.detach().to(torch.float32)
    if is_narrow(parameter) and options["master"] == "stochastic":
        state["rounding_step"] = torch.tensor(0.0, device="cpu")
    return state


def _row_state(
    name: str,
    parameter: Tensor,
    matrices: MatrixSpec,
    owned: OwnedMatrices | None,
    dtype: torch.dtype,
) -> Tensor:
    shape = row_state_shape(parameter.shape, matrices)
    if owned is not None:
        sharding, numbers = owned
        return partitioned_zeros(
            shape, (row_state_sharding(sharding), numbers), dtype, parameter.device
        )
    sharding = sharding_of(name, parameter, matrices)
    if sharding is None:
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    return zeros_with_sharding(parameter, row_state_sharding(sharding), dtype)


def keep_by_name(
    groups: list[Group],
    state: MutableMapping[Tensor, dict[str, Any]],
    owners: dict[str, Tensor],
    owned: Callable[[str], OwnedMatrices | None] = lambda name: None,
    *,
    resized: Literal["refuse", "leave"] = "refuse",
) -> list[str]:
    """Ensure that every parameter in `groups` has state that fits it.

    If a parameter was replaced by another tensor, moved to another device or cast, its state is
    carried over by name. A parameter without state gets new state.

    Args:
        groups: parameter groups of the optimizer.
        state: state by parameter; updated in place.
        owners: the last parameter of each name; updated in place.
        owned: returns the argument `owned` of `new_state` for a name.
        resized: what to do with the state of a parameter that was resized in place.

    Returns:
        Names of parameters in 16 bits that lose small steps to rounding (master="none").

    Raises:
        GroupingError: if names and parameters do not match, or the rule does not accept the
            parameter.
        LayoutError: if the shape of a parameter has changed, in place or with another tensor.
    """
    for group in groups:
        check_names(group)
    changed = []
    unprotected = []
    for group in groups:
        first, keys, narrow_keys = _keys_of(group)
        for name, parameter in named(group):
            held = state.get(parameter) if owners.get(name) is parameter else None
            wanted = keys
            if is_narrow(parameter):
                wanted = narrow_keys
                if group["master"] == "none":
                    unprotected.append(name)
            if resized == "leave" and held and held[first].shape != parameter.shape:
                continue
            if held is None or held.keys() != wanted or not _fits(held[first], parameter):
                changed.append((name, parameter, group))
    fresh = {
        name: _renew(
            name,
            parameter,
            group,
            state.get(owners[name]) if name in owners else None,
            owned(name),
        )
        for name, parameter, group in changed
    }
    for name in fresh.keys() & owners.keys():
        state.pop(owners[name], None)
    for name, parameter, _ in changed:
        state[parameter] = fresh[name]
        owners[name] = parameter
    return unprotected


def _renew(
    name: str,
    parameter: Tensor,
    group: Group,
    old: Mapping[str, Tensor] | None,
    owned: OwnedMatrices | None,
) -> dict[str, Tensor]:
    first, _, _ = _keys_of(group)
    if old is not None and first in old and old[first].shape != parameter.shape:
        raise _reshaped(name, first, old[first], parameter)
    check_parameter(name, parameter, group)
    fresh = new_state(name, parameter, group, owned)
    for key in fresh:
        if old is None or key not in old:
            continue
        if old[key].shape != fresh[key].shape:
            raise _reshaped(name, key, old[key], fresh[key])
        copy_(fresh[key], old[key])
    return fresh


def _reshaped(name: str, key: str, old: Tensor, new: Tensor) -> LayoutError:
    return LayoutError(
        f"the {key} of {name} has shape {tuple(old.shape)}, but must have {tuple(new.shape)}: the "
        "parameter was resized or replaced after the optimizer was made. Make a new optimizer of "
        "the model; load_state_dict(old.state_dict(), strict=False) takes over the state that fits"
    )


def _keys_of(group: Group) -> tuple[str, set[str], set[str]]:
    """Return the first elementwise state, and the keys of a wide and of a narrow parameter's
    state."""
    tensors = rule_of(group).state(group)
    keys = {tensor.name for tensor in tensors}
    more = {"none": set[str](), "float32": {"master"}, "stochastic": {"rounding_step"}}
    return tensors[0].name, keys, keys | more[group["master"]]


def _fits(moment: Tensor, parameter: Tensor) -> bool:
    dtype = parameter.dtype if parameter.dtype.itemsize > 4 else torch.float32
    fits = moment.dtype == dtype and moment.device == parameter.device
    return fits and moment.shape == parameter.shape
