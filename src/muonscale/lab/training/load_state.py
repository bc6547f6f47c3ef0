"""Optimizer state from a file (`optimizer.state`) as the start of a run.

Momentum and moments are taken over, options are not: learning rates and decay are the run's own.
"""

from __future__ import annotations

import warnings
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muonscale.errors import CheckpointError, ConfigError
from muonscale.optim.distributed.dtensor import is_sharded
from muonscale.optim.migrate.convert_state import SOURCES, convert_state_dict, join_state_dicts
from muonscale.optim.muon import Muon
from muonscale.optim.rules import ADAMW, MUON
from muonscale.optim.rules.step_inputs import named

StateDict = dict[str, Any]
Kind = tuple[str, int, int]
"""A rule, and the shape of a tensor: rows, and all other axes as one."""

RULE_OF = {"momentum_buffer": MUON.name, "exp_avg": ADAMW.name, "moment1": ADAMW.name}
"""By the key of a tensor that has its parameter's shape."""

SHOWN = 8
"""Lines of a list of differences."""


def take_over_state(model: nn.Module, optimizer: Muon, path: Path, source: str | None) -> str:
    """Load momentum and moments from a file, and return a sentence about it.

    Every rank reads the file and keeps its own part.

    Args:
        model: on this rank, sharded or not.
        optimizer: of its parameters; options stay as they are.
        path: of what `torch.save` wrote: a state dict of whole tensors, or several of them as a list
            or as the values of a dict.
        source: which optimizer it is of, a row of `SOURCES`; None for ours.

    Raises:
        CheckpointError: if the file cannot be read, or does not fit the model.
        ConfigError: if it is not ours and no source is given.
    """
    found = _read(path)
    if source is None:
        names = _names_of_ours(found, path)
        whole, stepped = found[0], len(names & _names(optimizer))
        how = ""
    else:
        naming = _Naming(model, optimizer, path)
        parts = [naming.convert(state_dict, source) for state_dict in found]
        whole, stepped = _joined(parts, path), naming.stepped
        how = "; it has no names: told apart by rule, shape and order" if naming.guessed else ""
    _load(optimizer, whole, path)
    total = len(_names(optimizer))
    return f"state of {stepped} of {total} parameters from {path} ({source or 'muonscale'}){how}"


def _names(optimizer: Muon) -> set[str]:
    return {name for group in optimizer.param_groups for name, _ in named(group)}


def _read(path: Path) -> list[StateDict]:
    """Return the state dicts in a file."""
    try:
        # Mapped, so that the ranks of a machine have it in memory once.
        content = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # pickle, zip and torch each raise their own
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"optimizer.state={path} cannot be read: {reason}; give a file that torch.save wrote"
        ) from error
    parts = content
    if isinstance(content, Mapping):
        parts = [content] if "param_groups" in content else list(content.values())
    if not isinstance(parts, (list, tuple)) or not parts or not all(map(_is_state_dict, parts)):
        has = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"optimizer.state={path} holds no optimizer's state_dict(), with state and param_groups, "
            f"and no list of them; it has {has}"
            "; save it with torch.save(optimizer.state_dict(), FILE)"
        )
    if any(is_sharded(v) for part in parts for s in part["state"].values() for v in s.values()):
        raise CheckpointError(
            f"optimizer.state={path} holds tensors of one rank of a sharded run: save whole ones, "
            "with full_state_dict()"
        )
    return list(parts)


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), (list, tuple))
        and all("params" in group for group in value["param_groups"])
        and all(isinstance(state, Mapping) for state in value["state"].values())
    )


def _names_of_ours(found: list[StateDict], path: Path) -> set[str]:
    groups = [group for part in found for group in part["param_groups"]]
    if len(found) > 1 or not all({"rule", "param_names"} <= group.keys() for group in groups):
        raise ConfigError(
            f"optimizer.state={path} is not of muonscale's Muon: say whose it is with "
            "optimizer.state_format="
            + " or ".join(f"{name} ({source.what})" for name, source in SOURCES.items())
        )
    return {name for group in groups for name in group["param_names"]}


class _Naming:
    """Finds the names of another optimizer's parameters, which are numbers to it.

    Where they are not in the file, the n-th tensor of a rule and a shape belongs to the n-th such
    parameter of the model: optimizers that sort by size keep that order too.
    """

    def __init__(self, model: nn.Module, optimizer: Muon, path: Path) -> None:
        self.guessed = False
        """Whether the file has no names."""
        self.stepped = 0
        """Parameters that have a state in the file."""
        self._path = path
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        rules = {n: group["rule"] for group in optimizer.param_groups for n, _ in named(group)}
        self._free: dict[Kind, list[str]] = defaultdict(list)
        for name, shape in self._shapes.items():
            if name in rules:
                self._free[(rules[name], *_flat(shape))].append(name)

    def convert(self, state_dict: StateDict, source: str) -> StateDict:
        """Return a state dict of another optimizer as one of ours."""
        numbers: list[tuple[str, Tensor]] = []
        for group in state_dict["param_groups"]:
            names = group.get("param_names") or [None] * len(group["params"])
            for number, name in zip(group["params"], names, strict=True):
                name = number if isinstance(number, str) else name
                state = state_dict["state"].get(number, {})
                self.stepped += bool(state)
                name = self._checked(name, state) if name else self._guess(number, state)
                numbers.append((name, torch.zeros(()).expand(self._shapes[name])))
        try:
            return convert_state_dict(state_dict, numbers, source)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"optimizer.state={self._path} is not a state of {SOURCES[source].what} "
                f"({type(error).__name__}: {error})"
                "; set optimizer.state_format to the one that wrote it"
            ) from error

    def _checked(self, name: str, state: Mapping[str, Any]) -> str:
        if name not in self._shapes:
            raise CheckpointError(
                f"optimizer.state={self._path} has a parameter {name}, which this model does not have"
                "; give the state of this model"
            )
        for key in RULE_OF:
            if key in state and _flat(state[key].shape) != _flat(self._shapes[name]):
                raise CheckpointError(
                    f"optimizer.state={self._path}: {key} of {name} has the shape "
                    f"{tuple(state[key].shape)}, and the parameter {self._shapes[name]}"
                    "; give the state of this model"
                )
        return name

    def _guess(self, number: Any, state: Mapping[str, Any]) -> str:
        self.guessed = True
        key = next((key for key in RULE_OF if key in state), None)
        if key is None:
            raise CheckpointError(
                f"optimizer.state={self._path} has no names, and no state of parameter {number} to "
                "tell by its shape which it is; save it from an optimizer of named parameters"
            )
        rule, shape = RULE_OF[key], tuple(state[key].shape)
        free = self._free[(rule, *_flat(shape))]
        if not free:
            raise CheckpointError(
                f"optimizer.state={self._path} has more parameters of the shape {shape} on {rule} "
                "than this model in this run"
                "; give the state of this model, saved with named parameters"
            )
        return free.pop(0)


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of a tensor; some optimizers flatten what has more axes."""
    rows = shape[0] if shape else 1
    return rows, torch.Size(shape).numel() // max(1, rows)


def _joined(parts: list[StateDict], path: Path) -> StateDict:
    try:
        return parts[0] if len(parts) == 1 else join_state_dicts(parts)
    except CheckpointError as error:
        raise CheckpointError(f"optimizer.state={path}: {error}") from error


def _load(optimizer: Muon, state_dict: StateDict, path: Path) -> None:
    """Load a state dict, but for its options."""
    kept = [dict(group) for group in optimizer.param_groups]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="parameter group")  # says that options stay
            optimizer.load_state_dict(state_dict)
    except CheckpointError as error:
        first, *lines = str(error).splitlines()
        more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        text = "\n".join([first, *lines[:SHOWN], *more])
        raise CheckpointError(f"optimizer.state={path}: {text}") from error
    for group, options in zip(optimizer.param_groups, kept, strict=True):
        group.clear()
        group.update(options)
