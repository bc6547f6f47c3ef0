"""Optimizer state by parameter name: what a state dict holds, and how one is taken over.

A state dict has torch's form: `state` by running number, `param_groups` with those numbers under
`params` and the names under `param_names`. Loading goes by name, so that the order and the grouping
of parameters may have changed. Of groups of ours whose names a trainer has dropped (torchtitan does)
the places are taken, if groups and numbers of parameters are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from muonscale.errors import CheckpointError
from muonscale.optim.distributed.zero1 import copy_, scale_
from muonscale.optim.newton_schulz.coefficients import as_plain, from_plain
from muonscale.optim.rules.muon import ROW_STATE
from muonscale.optim.rules.step_inputs import named

NOT_SAVED = frozenset({"params", "matrices", "why"})
"""Group entries that describe the model rather than the training state."""

Group = dict[str, Any]
State = Mapping[Tensor, dict[str, Any]]
StateDict = Mapping[str, Any]


def plain(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return torch's state dict with only such group entries as `torch.load` takes by default.

    Those that describe the model, and functions, are None in it and not missing: torch's flattened
    form is loaded by asking for every entry of the groups.
    """

    def saved(key: str, value: Any) -> Any:
        left_out = key != "params" and key in NOT_SAVED
        if left_out or callable(value):
            return None
        return as_plain(value) if key == "ns_coefficients" else value

    groups = [{k: saved(k, v) for k, v in group.items()} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def take_over(state_dict: StateDict, groups: list[Group], state: State) -> None:
    """Copy the state and the group options of `state_dict` into `groups` and `state`.

    Values keep the dtype and device that they have in `state`. A group takes the saved options if
    the saved dict has a group of exactly its parameters; where the grouping has changed it keeps
    its own and warns.

    Raises:
        CheckpointError: without names in groups that are not these, or where names, shapes or rules
            differ. Nothing has been written then.
    """
    saved_groups = _with_names(state_dict["param_groups"], groups)
    saved = _saved_by_name(saved_groups, state_dict["state"])
    current = {name: state[parameter] for group in groups for name, parameter in named(group)}
    if differences := _differences(saved, current):
        raise CheckpointError(
            "the optimizer state does not fit; take that of the same model and rules:\n  "
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
    """Return the saved groups, with names of the same places in `groups` where they have none."""
    if all("param_names" in group for group in saved_groups):
        return saved_groups
    if [_identity(group) for group in saved_groups] != [_identity(group) for group in groups]:
        raise CheckpointError(
            f"the {len(saved_groups)} groups of the optimizer state have no param_names and are not those "
            "of this optimizer, so its tensors have no parameter: save it from an optimizer that was "
            "given named parameters; the state of torch.optim.Muon and of other Muons is made one of "
            "ours by convert_state_dict"
        )
    unnamed = [str(group.get("name")) for group in saved_groups if "param_names" not in group]
    warnings.warn(
        f"the optimizer state has no param_names in {', '.join(unnamed)}; its groups are those of this "
        "optimizer, so tensors are taken in the order in which they stand there",
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
                asked = '"normuon"' if ROW_STATE in have else "None, or another than it is"
                hint = f" (saved with post_norm={asked})"
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
    """Return 1 - mu for the names whose saved momentum is a sum; an average needs no factor."""
    scales: dict[str, float] = {}
    for group in saved_groups:
        convention = group.get("momentum_convention", "ema")
        if convention not in ("ema", "sum"):
            raise CheckpointError(
                f"momentum convention {convention!r} is unknown; accepted: ema, sum"
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
                f"parameter group {group.get('name', '?')!r} is not a group of the saved state: its "
                "lr and other options stay as they are",
                stacklevel=4,
            )
            continue
        functions = {k for k, v in group.items() if callable(v) and saved.get(k) is None}
        group.update({k: v for k, v in saved.items() if k not in kept | functions})
        if "ns_coefficients" in group:
            group["ns_coefficients"] = from_plain(group["ns_coefficients"])
