"""Saving and loading of the optimizer's state dict.

A state dict has torch's form: `state` is indexed by number, and `param_groups` lists these numbers
as `params` and the parameter names as `param_names`. State is loaded by name, so the order and the
grouping of parameters may have changed. If a trainer has dropped the names, as torchtitan does,
state is loaded by order; the groups and their numbers of parameters must then be the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonscale.errors import CheckpointError, ConfigError, shown
from muonscale.optim.distributed.dtensor import to_local
from muonscale.optim.distributed.zero1 import PartitionedTensor, copy_, scale_
from muonscale.optim.newton_schulz.coefficients import from_plain, to_plain
from muonscale.optim.options import check_options_given, option_names
from muonscale.optim.parameters.validate import GROUP_KEYS, OF_SCHEDULERS, check_options
from muonscale.optim.rules.base import rule_of
from muonscale.optim.rules.muon import ROW_STATE
from muonscale.optim.rules.post_norm import POST_NORMS
from muonscale.optim.rules.step_inputs import named
from muonscale.optim.state.state import counters_of, not_negative_state

NOT_SAVED = frozenset({"params", "matrices", "why", "guessed"})
"""Group entries that describe the model and not the training state."""


class IncompatibleKeys(NamedTuple):
    """What `Muon.load_state_dict` did not take over, by parameter name. Empty if all fits."""

    missing_keys: list[str]
    """Parameters of the optimizer that the saved state does not have; their state stays as it is."""
    unexpected_keys: list[str]
    """Parameters of the saved state that the optimizer does not have."""
    mismatched_keys: dict[str, list[str]]
    """Parameters whose saved state has other shapes or other entries, and how they differ. If the
    entries without which a rule cannot go on fit, those that fit are taken over; else none is."""


Group = dict[str, Any]
State = Mapping[Tensor, dict[str, Any]]
StateDict = Mapping[str, Any]


def to_loadable(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return torch's state dict with group entries that `torch.load` accepts by default.

    Functions and entries that describe the model become None. They are not removed, because torch's
    flattened form needs every entry of the groups when it is loaded.
    """

    def convert(key: str, value: Any) -> Any:
        if callable(value) or (key != "params" and key in NOT_SAVED):
            return None
        return to_plain(value) if key == "ns_coefficients" else value

    groups = [{k: convert(k, v) for k, v in group.items()} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def check_form(state_dict: Any) -> None:
    """Raise CheckpointError for what is no state dict of an optimizer."""
    problem = ""
    if not isinstance(state_dict, Mapping):
        problem = f"is a {type(state_dict).__name__}"
    elif missing := {"state", "param_groups"} - state_dict.keys():
        problem = (
            f"has no {' and no '.join(sorted(missing))}, only {shown(sorted(state_dict, key=str))}"
        )
    elif not isinstance(state := state_dict["state"], Mapping):
        problem = f"has as its state a {type(state).__name__}"
    elif not all(isinstance(values, Mapping) for values in state.values()):
        problem = "has in its state what is no dict"
    elif other := [v for values in state.values() for v in values.values() if not _is_value(v)]:
        problem = f"has in its state a {type(other[0]).__name__}"
    elif not isinstance(groups := state_dict["param_groups"], Sequence):
        problem = f"has as its param_groups a {type(groups).__name__}"
    elif not all(isinstance(g, Mapping) and _are_keys(g.get("params")) for g in groups):
        problem = "has a group without a list of params, numbers or names"
    elif not all(_fit_names(g.get("param_names", g["params"]), g["params"]) for g in groups):
        problem = "has a group without one name for each of its params"
    elif meta := [n for n, values in state.items() if any(map(_is_meta, values.values()))]:
        problem = f"has tensors on the meta device, which have no values (parameter {meta[0]})"
    if problem:
        raise CheckpointError(
            f"the optimizer state {problem}; give what state_dict() of an optimizer returned"
        )


def _is_value(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_complex()
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _are_keys(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | str) for value in values)


def _fit_names(names: Any, params: list[Any]) -> bool:
    return _are_keys(names) and len(names) == len(params)


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def load_by_name(
    state_dict: StateDict, groups: list[Group], state: State, strict: bool = True
) -> IncompatibleKeys:
    """Copy the state and the group options of `state_dict` into `groups` and `state`.

    Values keep the dtype and device that they have in `state`. A group gets the options of the
    saved group with exactly its parameters. If there is none, it keeps its own options, with a
    warning. Unless `strict`, only what fits is copied.

    Returns:
        What does not fit.

    Raises:
        CheckpointError: if it is no state dict, if names are missing and the groups differ, if a
            value is not finite or an option is outside its range, or, if `strict`, if names, shapes
            or rules differ. Nothing is written in that case.
    """
    check_form(state_dict)
    saved_groups = _add_names(state_dict["param_groups"], groups)
    saved = {
        name: state_dict["state"].get(number, {})
        for group in saved_groups
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    current = {name: state[parameter] for group in groups for name, parameter in named(group)}
    differing = _compare(saved, current)
    if strict and any(differing):
        raise CheckpointError(
            "the optimizer state does not fit. Load the state of the same model and rules, or give "
            "strict=False, which takes over what fits:\n  " + "\n  ".join(_lines(differing))
        )
    scales = _momentum_scales(saved_groups)
    options = _options_of(saved_groups, groups)
    fitting = {
        name: _fitting_keys(group, saved.get(name, {}), current[name])
        for group in groups
        for name in group["param_names"]
    }
    for group in groups:
        not_negative, counters = not_negative_state(group), counters_of(group)
        for name in group["param_names"]:
            for key in fitting[name]:
                _check_values(name, key, saved[name][key], not_negative, counters)
    for name, keys in fitting.items():
        for key in keys:
            copy_(current[name][key], _as_tensor(saved[name][key]))
            if key == "momentum_buffer" and name in scales:
                scale_(current[name][key], scales[name])
    for group, values in zip(groups, options, strict=True):
        group.update(values)
    return differing


def _check_values(
    name: str, key: str, value: Any, not_negative: Collection[str], counters: Collection[str]
) -> None:
    """Raise CheckpointError for values from which the next step would make weights of NaN.

    Each rank checks its own part, in one pass without a copy.
    """
    tensor = _as_tensor(value)
    partitioned = isinstance(tensor, PartitionedTensor)
    for part in tensor.parts.values() if partitioned else [to_local(tensor)]:
        if not part.numel():
            continue
        wide = part.float() if part.dtype.itemsize == 1 else part  # 8 bits have no minimum
        low, high = (bound.item() for bound in torch.aminmax(wide.detach()))
        problem = ""
        if not (math.isfinite(low) and math.isfinite(high)):
            problem = "is not finite everywhere"
        elif low < 0 and key in not_negative:
            problem = f"has the value {low:g}, and is never negative"
        elif key in counters and high >= 2**31:
            problem = f"has the value {high:g}, which is no number of steps"
        if problem:
            raise CheckpointError(
                f"the {key} of {name} in the optimizer state {problem}: steps would spoil the "
                "weights. Load a state that was saved before this happened"
            )


def _fitting_keys(group: Group, have: StateDict, want: StateDict) -> list[str]:
    """Return the state of a parameter that can be taken over: none unless all moments can be."""
    fitting = [k for k in want if k in have and _as_tensor(have[k]).shape == want[k].shape]
    needed = {tensor.name for tensor in rule_of(group).state(group) if "row" not in tensor.per}
    return fitting if needed <= set(fitting) else []


def _add_names(saved_groups: list[Group], groups: list[Group]) -> list[Group]:
    """Return the saved groups. Those without names get the names of the same group in `groups`."""
    if all("param_names" in group for group in saved_groups):
        return saved_groups
    if [_identity(group) for group in saved_groups] != [_identity(group) for group in groups]:
        raise CheckpointError(
            f"the {len(saved_groups)} groups of the optimizer state have no param_names and differ from "
            "those of this optimizer, so tensors cannot be matched with parameters. Save the state of an "
            "optimizer with named parameters, or convert that of another implementation with "
            "convert_state_dict"
        )
    unnamed = [str(group.get("name")) for group in saved_groups if "param_names" not in group]
    warnings.warn(
        f"the groups {', '.join(unnamed)} of the optimizer state have no param_names. They are like those "
        "of this optimizer, so tensors are matched with parameters by order",
        stacklevel=4,
    )
    return [
        {**saved, "param_names": saved.get("param_names", group["param_names"])}
        for saved, group in zip(saved_groups, groups, strict=True)
    ]


def _identity(group: Group) -> tuple[Any, Any, int]:
    return group.get("name"), group.get("rule"), len(group["params"])


def _compare(saved: Mapping[str, Any], current: Mapping[str, Any]) -> IncompatibleKeys:
    mismatched: dict[str, list[str]] = {}
    for name in sorted(current.keys() & saved.keys()):
        have, want = saved[name], current[name]
        if have.keys() != want.keys():
            hint = ""
            if have.keys() ^ want.keys() == {ROW_STATE}:
                names = " or ".join(f'"{n}"' for n, norm in POST_NORMS.items() if norm.row_state)
                hint = f" (saved with{'' if ROW_STATE in have else 'out'} post_norm={names})"
            mismatched[name] = [
                f"saved with {sorted(map(str, have))}, but needs {sorted(want)}{hint}"
            ]
        for key in want.keys() & have.keys():
            old, new = tuple(_as_tensor(have[key]).shape), tuple(want[key].shape)
            if old != new:
                mismatched.setdefault(name, []).append(f"{key} was saved as {old}, but is {new}")
    return IncompatibleKeys(
        sorted(current.keys() - saved.keys()), sorted(saved.keys() - current.keys()), mismatched
    )


def _lines(differing: IncompatibleKeys) -> list[str]:
    return [
        *(f"missing: {name}" for name in differing.missing_keys),
        *(f"unexpected: {name}" for name in differing.unexpected_keys),
        *(
            f"different: {name}: {'; '.join(how)}"
            for name, how in differing.mismatched_keys.items()
        ),
    ]


def _as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu")


def _momentum_scales(saved_groups: list[Group]) -> dict[str, float]:
    """Return 1 - mu for each name whose saved momentum is a sum. An average needs no factor."""
    scales: dict[str, float] = {}
    for group in saved_groups:
        convention = group.get("momentum_convention", "ema")
        if convention not in ("ema", "sum"):
            raise CheckpointError(
                f"momentum_convention={convention!r} is unknown; accepted: ema, sum"
            )
        if convention == "sum":
            check_options_given({"momentum": group.get("momentum")})
            scales |= dict.fromkeys(group["param_names"], 1 - group["momentum"])
    return scales


def _options_of(saved_groups: list[Group], groups: list[Group]) -> list[Group]:
    """Return for each group the options that it takes over.

    Raises:
        CheckpointError: if one is outside its range.
    """
    by_names = {frozenset(group["param_names"]): group for group in saved_groups}
    kept = NOT_SAVED | {"param_names", "momentum_convention"}
    found: list[Group] = []
    for group in groups:
        title = f"parameter group {group.get('name', '?')!r}"
        saved = by_names.get(frozenset(group["param_names"]))
        if saved is None:
            warnings.warn(
                f"{title} is not in the saved state: it keeps its lr and other options",
                stacklevel=4,
            )
            found.append({})
            continue
        if unknown := saved.keys() - GROUP_KEYS - OF_SCHEDULERS - option_names():
            warnings.warn(
                f"{title} was saved with {sorted(unknown, key=str)}, which are no "
                "options: they are ignored (convert_state_dict converts those of other optimizers)",
                stacklevel=4,
            )
        kept_here = {k for k, v in group.items() if callable(v) and saved.get(k) is None}
        values = {k: v for k, v in saved.items() if k not in kept | kept_here | unknown}
        if "ns_coefficients" in values:
            values["ns_coefficients"] = from_plain(values["ns_coefficients"])
        try:
            check_options({**group, **values})
        except ConfigError as error:
            raise CheckpointError(
                f"{title} was saved with an option that cannot be used: {error}"
            ) from error
        found.append(values)
    return found
