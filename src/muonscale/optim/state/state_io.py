"""The optimizer's state dict: how it is saved and loaded.

A state dict has torch's form: `state` is indexed by number, and `param_groups` lists these numbers
as `params` and the parameter names as `param_names`. State is loaded by name, so the order and the
grouping of parameters may have changed. If a trainer has dropped the names (torchtitan does), state
is loaded by order, provided that groups and numbers of parameters are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from muonscale.errors import CheckpointError
from muonscale.optim.distributed.zero1 import copy_, scale_
from muonscale.optim.newton_schulz.coefficients import from_plain, to_plain
from muonscale.optim.options import option_names
from muonscale.optim.parameters.validate import GROUP_KEYS, OF_SCHEDULERS
from muonscale.optim.rules.muon import ROW_STATE
from muonscale.optim.rules.step_inputs import named

NOT_SAVED = frozenset({"params", "matrices", "why"})
"""Group entries that describe the model and not the training state."""

Group = dict[str, Any]
State = Mapping[Tensor, dict[str, Any]]
StateDict = Mapping[str, Any]


def to_loadable(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return torch's state dict with only group entries that `torch.load` accepts by default.

    Functions and entries that describe the model are None rather than missing, because torch's
    flattened form asks for every entry of the groups when it is loaded.
    """

    def to_save(key: str, value: Any) -> Any:
        left_out = key != "params" and key in NOT_SAVED
        if left_out or callable(value):
            return None
        return to_plain(value) if key == "ns_coefficients" else value

    groups = [{k: to_save(k, v) for k, v in group.items()} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def load_by_name(state_dict: StateDict, groups: list[Group], state: State) -> None:
    """Copy the state and the group options of `state_dict` into `groups` and `state`.

    Values keep the dtype and device that they have in `state`. A group gets the saved options if
    the saved dict has a group with exactly its parameters. Otherwise it keeps its own and warns.

    Raises:
        CheckpointError: if names are missing and the groups differ, or if names, shapes or rules
            differ. Nothing is written in that case.
    """
    saved_groups = _with_names(state_dict["param_groups"], groups)
    saved = _saved_by_name(saved_groups, state_dict["state"])
    current = {name: state[parameter] for group in groups for name, parameter in named(group)}
    if differences := _differences(saved, current):
        raise CheckpointError(
            "the optimizer state does not fit; take one of the same model and rules:\n  "
            + "\n  ".join(differences)
        )
    scales = _momentum_scales(saved_groups)
    for name, values in current.items():
        for key, value in values.items():
            source = saved[name][key]
            copy_(value, _tensor(source))
            if key == "momentum_buffer" and name in scales:
                scale_(value, scales[name])
    _take_options(saved_groups, groups)


def _with_names(saved_groups: list[Group], groups: list[Group]) -> list[Group]:
    """Return the saved groups; those without names get the names of the same group in `groups`."""
    if all("param_names" in group for group in saved_groups):
        return saved_groups
    if [_identity(group) for group in saved_groups] != [_identity(group) for group in groups]:
        raise CheckpointError(
            f"the {len(saved_groups)} groups of the optimizer state have no param_names and differ from "
            "those of this optimizer, so its tensors cannot be matched with parameters. Save it from an "
            "optimizer that was given named parameters. convert_state_dict converts the state of "
            "torch.optim.Muon and of other implementations"
        )
    unnamed = [str(group.get("name")) for group in saved_groups if "param_names" not in group]
    warnings.warn(
        f"the optimizer state has no param_names in {', '.join(unnamed)}; its groups are like those of "
        "this optimizer, so its tensors are matched with parameters by their order",
        stacklevel=4,
    )
    return [
        {**saved, "param_names": saved.get("param_names", group["param_names"])}
        for saved, group in zip(saved_groups, groups, strict=True)
    ]


def _identity(group: Group) -> tuple[Any, Any, int]:
    return group.get("name"), group.get("rule"), len(group["params"])


def _saved_by_name(
    saved_groups: list[Group], state: Mapping[int, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    return {
        name: state.get(number, {})
        for group in saved_groups
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    lines = [f"missing: {name}" for name in sorted(current.keys() - saved.keys())]
    lines += [f"unexpected: {name}" for name in sorted(saved.keys() - current.keys())]
    for name in sorted(current.keys() & saved.keys()):
        have, want = saved[name], current[name]
        if have.keys() != want.keys():
            hint = ""
            if have.keys() ^ want.keys() == {ROW_STATE}:
                post_norm = '"normuon"' if ROW_STATE in have else "None, or another one"
                hint = f" (saved with post_norm={post_norm})"
            lines.append(
                f"other state: {name} has {sorted(have)}, now it needs {sorted(want)}{hint}"
            )
            continue
        for key in want:
            shapes = tuple(_tensor(have[key]).shape), tuple(want[key].shape)
            if shapes[0] != shapes[1]:
                lines.append(f"other shape: {name} has {key} {shapes[0]}, now it is {shapes[1]}")
    return lines


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def _momentum_scales(saved_groups: list[Group]) -> dict[str, float]:
    """Return 1 - mu for each name whose saved momentum is a sum; an average needs no factor."""
    scales: dict[str, float] = {}
    for group in saved_groups:
        convention = group.get("momentum_convention", "ema")
        if convention not in ("ema", "sum"):
            raise CheckpointError(
                f"momentum_convention={convention!r} is unknown; accepted: ema, sum"
            )
        if convention == "sum":
            scales |= dict.fromkeys(group["param_names"], 1 - group["momentum"])
    return scales


def _take_options(saved_groups: list[Group], groups: list[Group]) -> None:
    by_names = {frozenset(group["param_names"]): group for group in saved_groups}
    kept = NOT_SAVED | {"param_names", "momentum_convention"}
    for group in groups:
        saved = by_names.get(frozenset(group["param_names"]))
        if saved is None:
            warnings.warn(
                f"parameter group {group.get('name', '?')!r} is not in the saved state, so it keeps its "
                "own lr and other options",
                stacklevel=4,
            )
            continue
        if unknown := saved.keys() - GROUP_KEYS - OF_SCHEDULERS - option_names():
            warnings.warn(
                f"parameter group {group.get('name', '?')!r} was saved with {sorted(unknown)}, and no "
                "option is called that: left out (convert_state_dict translates those of other Muons)",
                stacklevel=4,
            )
            saved = {key: value for key, value in saved.items() if key not in unknown}
        functions = {k for k, v in group.items() if callable(v) and saved.get(k) is None}
        group.update({k: v for k, v in saved.items() if k not in kept | functions})
        if "ns_coefficients" in group:
            group["ns_coefficients"] = from_plain(group["ns_coefficients"])
