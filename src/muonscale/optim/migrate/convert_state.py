"""Conversion of other optimizers' state dicts to one that `Muon.load_state_dict` takes.

The caller has to give parameter names and the source. Names, because other optimizers number their
parameters. The source, because momentum is a sum in some and an average in others: the wrong one
would turn the next steps by tens of degrees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from muonscale.errors import CheckpointError, ConfigError, nearest
from muonscale.optim.migrate.aliases import FOREIGN
from muonscale.optim.migrate.translate import find_renames
from muonscale.optim.rules import ADAMW, MUON
from muonscale.optim.rules.base import RULES
from muonscale.optim.rules.muon import MOMENTUM_CONVENTION, ROW_STATE
from muonscale.optim.state.state_io import check_form

MomentumConventionT = Literal["ema", "sum"]
StateDict = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """An optimizer whose saved state can be converted."""

    convention: MomentumConventionT
    """Whether momentum is an average ("ema") or a sum."""
    scale: str
    """Its shape factor, if the saved groups do not contain it."""
    what: str


SOURCES: dict[str, Source] = {
    "torch": Source(
        convention="ema", scale="keller", what="torch.optim.Muon, torch.optim.AdamW (2.13)"
    ),
    "keller": Source(
        convention="ema", scale="keller", what="KellerJordan/Muon of 2025, with or without AuxAdam"
    ),
    "keller_2024": Source(
        convention="sum", scale="keller", what="KellerJordan/Muon before momentum.lerp_"
    ),
    "moonlight": Source(
        convention="sum", scale="rms", what="MoonshotAI/Moonlight, examples/toy_train.py"
    ),
    "normuon": Source(
        convention="ema", scale="keller", what="zichongli5/NorMuon, with or without AuxAdam"
    ),
}
"""Sources by name, read from their code in 2026."""

_KEYS = {
    "momentum_buffer": "momentum_buffer",
    "second_momentum_buffer": ROW_STATE,
    "exp_avg": "exp_avg",
    "moment1": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "moment2": "exp_avg_sq",
    "step": "step",
}
"""State keys of `Muon` by theirs."""
_OPTIONS = {
    MUON.name: find_renames("torch", "keller", "keller_2024", "moonlight", "normuon"),
    ADAMW.name: find_renames("torch_adamw", "keller_adam", "keller_2024", "moonlight"),
}
"""Options of `Muon` by their group options, for each rule."""
_TORCH_SCALES = FOREIGN["torch"].arguments["adjust_lr_fn"].choices or {}


def convert_state_dict(
    state_dict: Mapping[str, Any],
    named_parameters: Iterable[tuple[str, Tensor]],
    source: str,
) -> StateDict:
    """Return the state dict of another optimizer as one that `Muon.load_state_dict` takes.

    Momentum becomes an average. State that the other optimizer has not created yet starts at zero.
    Options with the same meaning are converted too, including the shape factor that the learning
    rate was tuned for. `Muon.load_state_dict` loads them into groups that hold exactly the same
    parameters.

    Args:
        state_dict: result of the other optimizer's `state_dict()`.
        named_parameters: (name, parameter) in the order of that optimizer, group after group. Names
            are those of the new optimizer.
        source: a row of `SOURCES`.

    Raises:
        ConfigError: if the source is unknown.
        CheckpointError: if the number of names differs, a name occurs twice, or the rule of a
            parameter is not clear from the saved state.

    Examples:
        >>> from muonscale import Muon
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> named = [("up", weight)]
        >>> old = torch.optim.Muon([weight], lr=0.1)
        >>> new = Muon(named)
        >>> _ = new.load_state_dict(convert_state_dict(old.state_dict(), named, "torch"))
        >>> group = new.param_groups[0]
        >>> group["scale"]
        'keller'
    """
    if source not in SOURCES:
        raise ConfigError(f"no state source is called {source!r}: {nearest(source, SOURCES)}")
    check_form(state_dict)
    named = list(named_parameters)
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    if len(named) != len(numbers):
        raise CheckpointError(
            f"the saved state has {len(numbers)} parameters, but {len(named)} names were given. "
            "Give one name for each, in the order of its groups"
        )
    parameters = dict(zip(numbers, named, strict=True))
    state: dict[str, dict[str, Any]] = {}
    groups: list[StateDict] = []
    for group in state_dict["param_groups"]:
        on: dict[str, list[str]] = {MUON.name: [], ADAMW.name: []}
        for number in group["params"]:
            name, parameter = parameters[number]
            foreign = state_dict["state"].get(number, {})
            rule = _find_rule(name, foreign, group)
            on[rule].append(name)
            state[name] = _convert_state(foreign, parameter, rule, group, SOURCES[source])
        groups += [
            _convert_group(group, rule, on[rule], SOURCES[source]) for rule in on if on[rule]
        ]
    return _number(groups, state)


def join_state_dicts(state_dicts: Sequence[StateDict]) -> StateDict:
    """Return one state dict of several converted ones, for example of Muon and of AdamW.

    Raises:
        CheckpointError: if two of them have a parameter of the same name.
    """
    groups: list[StateDict] = []
    state: dict[str, dict[str, Any]] = {}
    for state_dict in state_dicts:
        check_form(state_dict)
        for group in state_dict["param_groups"]:
            groups.append(group)
            for name, number in zip(group["param_names"], group["params"], strict=True):
                if name in state:
                    raise CheckpointError(
                        f"two of the state dicts have a parameter called {name}. Give state dicts "
                        "of different parameters"
                    )
                state[name] = state_dict["state"][number]
    return _number(groups, state)


def _find_rule(name: str, foreign: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    if "use_muon" in foreign or "use_muon" in group:
        return (MUON if foreign.get("use_muon", group.get("use_muon")) else ADAMW).name
    if "momentum_buffer" in foreign or "momentum" in group:
        return MUON.name
    if "exp_avg" in foreign or "betas" in group:
        return ADAMW.name
    raise CheckpointError(
        f"{name}: neither its state ({sorted(foreign)}) nor its group ({sorted(group)}) shows "
        "whether it is on Muon or on AdamW. Check `source`, or save the state again with all its "
        "options"
    )


def _convert_state(
    foreign: Mapping[str, Any],
    parameter: Tensor,
    rule: str,
    group: Mapping[str, Any],
    source: Source,
) -> dict[str, Any]:
    found = {_KEYS[key]: value for key, value in foreign.items() if key in _KEYS}
    zeros = torch.zeros_like(parameter, dtype=torch.float32)
    if not RULES[rule].on_matrices:
        state = {
            "step": torch.tensor(0.0, device="cpu"),
            "exp_avg": zeros,
            "exp_avg_sq": zeros.clone(),
        }
        found["step"] = torch.tensor(float(found.get("step", 0.0)), device="cpu")
        return {key: found.get(key, value) for key, value in state.items()}
    state = {"momentum_buffer": found.get("momentum_buffer", zeros).reshape(parameter.shape)}
    if source.convention == "sum":
        state["momentum_buffer"] = state["momentum_buffer"] * (1 - float(group["momentum"]))
    if "beta2" in group:
        state[ROW_STATE] = found.get(ROW_STATE, zeros[..., :1].clone())
    return state


def _convert_group(
    group: Mapping[str, Any], rule: str, names: list[str], source: Source
) -> StateDict:
    options = {ours: group[theirs] for theirs, ours in _OPTIONS[rule].items() if theirs in group}
    options |= {"rule": rule, "param_names": names, "momentum_convention": MOMENTUM_CONVENTION}
    if not RULES[rule].on_matrices:
        kept = ("lr", "weight_decay", "betas", "eps", "rule", "param_names", "momentum_convention")
        if "adamw_lr_ratio" in group:
            options |= {"lr": group["lr"] * group["adamw_lr_ratio"]}
            options |= {"weight_decay": group["adamw_wd"]}
        return {key: options[key] for key in kept if key in options}
    options["scale"] = source.scale
    options.setdefault("weight_decay", 0.0)
    if "adjust_lr_fn" in group:
        options |= _TORCH_SCALES[group["adjust_lr_fn"]]
    elif source.scale == "rms":
        options["rms"] = 0.2
    if "beta2" in group:
        options["post_norm"] = "normuon"
    return options


def _number(groups: list[StateDict], state: Mapping[str, Any]) -> StateDict:
    names = [name for group in groups for name in group["param_names"]]
    numbers = {name: number for number, name in enumerate(names)}
    if len(numbers) != len(names):
        twice = min(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"two parameters are called {twice}: give each its own name")
    return {
        "state": {numbers[name]: state[name] for name in names},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["param_names"]]}
            for group in groups
        ],
    }
