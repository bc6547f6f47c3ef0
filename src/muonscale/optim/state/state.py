"""What the optimizer keeps of every parameter, from construction on, under the parameter's name.

| key                 | rule          | shape           | dtype                                      |
|---------------------|---------------|-----------------|--------------------------------------------|
| momentum_buffer     | muon          | the parameter's | float32; float64 for float64 parameters    |
| row_second_moment   | muon, normuon | one per row     | likewise                                   |
| exp_avg, exp_avg_sq | adamw         | the parameter's | likewise                                   |
| step                | adamw         | 0-D, on the CPU | float32                                    |
| master              | both, 16 bits | the parameter's | float32, with master="float32"             |
| rounding_step       | both, 16 bits | 0-D, on the CPU | float32, with master="stochastic"          |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from muonscale.errors import LayoutError
from muonscale.optim.distributed.dtensor import sharding_of, zeros_like_cut
from muonscale.optim.distributed.zero1 import OwnedMatrices, copy_, partitioned_zeros
from muonscale.optim.matrices.batches import row_state_shape, row_state_sharding
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.parameters.validate import check_parameter
from muonscale.optim.rules.base import rule_of
from muonscale.optim.rules.master_weights import is_narrow
from muonscale.optim.rules.step_inputs import Group, check_names, named


def counters_of(group: Group) -> list[str]:
    """Return the names of the state that counts the steps of a parameter that were not left out."""
    return [t.name for t in rule_of(group).state(group) if t.per == "parameter"] + ["rounding_step"]


def new_state(
    name: str, parameter: Tensor, options: Mapping[str, Any], owned: OwnedMatrices | None = None
) -> dict[str, Tensor]:
    """Return the state of a parameter that has not made a step.

    Args:
        name: the parameter's.
        parameter: any floating dtype and device.
        options: of its group, complete.
        owned: what of it is here, if it is dealt out to the ranks that hold the parameter.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)

    def zeros() -> Tensor:
        if owned is not None:
            return partitioned_zeros(tuple(parameter.shape), owned, dtype, parameter.device)
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)

    state: dict[str, Tensor] = {}
    for tensor in rule_of(options).state(options):
        if tensor.per == "element":
            state[tensor.name] = zeros()
        elif tensor.per == "row":
            matrices = options["matrices"].get(name, PLAIN)
            state[tensor.name] = _row_state(name, parameter, matrices, owned, dtype)
        else:
            state[tensor.name] = torch.tensor(0.0)
    if is_narrow(parameter) and options["master"] == "float32":
        state["master"] = parameter.detach().to(torch.float32)
    if is_narrow(parameter) and options["master"] == "stochastic":
        state["rounding_step"] = torch.tensor(0.0)
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
        layout, here = owned
        return partitioned_zeros(shape, (row_state_sharding(layout), here), dtype, parameter.device)
    layout = sharding_of(name, parameter, matrices)
    if layout is None:
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    return zeros_like_cut(parameter, row_state_sharding(layout), dtype)


def keep_by_name(
    groups: list[Group],
    state: MutableMapping[Tensor, dict[str, Any]],
    owners: dict[str, Tensor],
    owned: Callable[[str], OwnedMatrices | None] = lambda name: None,
) -> None:
    """Give every parameter in `groups` its state, by name, where something has changed.

    A parameter may have been replaced by another tensor, moved to another device, or cast, since
    its state was made; that state is then carried over. One that has no state gets a new one.

    Args:
        groups: of the optimizer.
        state: by parameter; written to.
        owners: the parameter that each name stood for; written to.
        owned: see `new_state`, by name.

    Raises:
        GroupingError: where names and parameters do not match, or the rule cannot work on what is
            there now.
        LayoutError: where the shape is another one.
    """
    for group in groups:
        check_names(group)
    changed = [
        (name, parameter, group)
        for group in groups
        for name, parameter in named(group)
        if owners.get(name) is not parameter or not _fits(state.get(parameter), parameter, group)
    ]
    fresh = {
        name: _renewed(
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


def _renewed(
    name: str,
    parameter: Tensor,
    group: Group,
    old: Mapping[str, Tensor] | None,
    owned: OwnedMatrices | None,
) -> dict[str, Tensor]:
    check_parameter(name, parameter, group)
    fresh = new_state(name, parameter, group, owned)
    for key in fresh:
        if old is None or key not in old:
            continue
        if old[key].shape != fresh[key].shape:
            raise LayoutError(
                f"{name} was replaced by a tensor of another shape: its {key} is "
                f"{tuple(old[key].shape)}, {tuple(fresh[key].shape)} is needed"
            )
        copy_(fresh[key], old[key])
    return fresh


def _fits(
    state: Mapping[str, Tensor] | None, parameter: Tensor, options: Mapping[str, Any]
) -> bool:
    tensors = rule_of(options).state(options)
    keys = {tensor.name for tensor in tensors}
    if is_narrow(parameter) and options["master"] != "none":
        keys.add("master" if options["master"] == "float32" else "rounding_step")
    if state is None or state.keys() != keys:
        return False
    moment = state[tensors[0].name]
    dtype = parameter.dtype if parameter.dtype.itemsize > 4 else torch.float32
    return moment.dtype == dtype and moment.device == parameter.device
