"""Load optimizer state from a file (`optimizer.state`) at the start of a run.

Momentum and moments are loaded. Options are not: learning rates and decay are those of the run.
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
from muonscale.lab.files import check_regular
from muonscale.optim.distributed.dtensor import is_sharded
from muonscale.optim.migrate.convert_state import SOURCES, convert_state_dict, join_state_dicts
from muonscale.optim.muon import Muon
from muonscale.optim.rules import ADAMW, MUON
from muonscale.optim.rules.step_inputs import named

StateDict = dict[str, Any]

RULE_OF = {"momentum_buffer": MUON.name, "exp_avg": ADAMW.name, "moment1": ADAMW.name}
"""Rule by the name of the state tensor that has its parameter's shape."""

LISTED = 8
"""Maximum number of differences in an error."""


def load_optimizer_state(model: nn.Module, optimizer: Muon, path: Path, source: str | None) -> str:
    """Load momentum and moments from a file, and return a sentence about it.

    Every rank reads the file and keeps its own part.

    Args:
        model: the model on this rank, sharded or not.
        optimizer: optimizer of its parameters; its options do not change.
        path: a file that `torch.save` wrote: a state dict of whole tensors, or several as a list or
            as the values of a dict.
        source: the optimizer that wrote it, a row of `SOURCES`; None for ours.

    Raises:
        CheckpointError: if the file cannot be read, or does not fit the model.
        ConfigError: if it is not ours and no source is given.
    """
    state_dicts = _read(path)
    own = {name for group in optimizer.param_groups for name, _ in named(group)}
    guess = ""
    if source is None:
        groups = [group for part in state_dicts for group in part["param_groups"]]
        ours = all({"rule", "param_names"} <= group.keys() for group in groups)
        if len(state_dicts) > 1 or not ours:
            raise ConfigError(
                f"optimizer.state={path} is not a state of muonscale's Muon; set "
                "optimizer.state_format="
                + " or ".join(f"{name} ({source.what})" for name, source in SOURCES.items())
            )
        names = {name for group in groups for name in group["param_names"]}
        whole, stepped = state_dicts[0], len(names & own)
    else:
        names = _ParameterNames(model, optimizer, path)
        parts = [names.convert(state_dict, source) for state_dict in state_dicts]
        try:
            whole = parts[0] if len(parts) == 1 else join_state_dicts(parts)
        except CheckpointError as error:
            raise CheckpointError(f"optimizer.state={path}: {error}") from error
        stepped = names.stepped
        if names.guessed:
            guess = "; it has no names: parameters were matched by rule, shape and order"
    _load_without_options(optimizer, whole, path)
    return (
        f"state of {stepped} of {len(own)} parameters from {path} ({source or 'muonscale'}){guess}"
    )


def check_state_file(path: Path) -> None:
    """Check that `optimizer.state` is a regular file.

    Raises:
        CheckpointError: if it is not.
    """
    try:
        check_regular(path)
    except OSError as error:
        raise CheckpointError(
            f"optimizer.state={path} cannot be read: {error.strerror}; give a file that torch.save "
            "wrote"
        ) from error


def _read(path: Path) -> list[StateDict]:
    """Return the state dicts in a file."""
    check_state_file(path)
    try:
        # Memory-mapped, so that the ranks of a machine share it.
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
            f"optimizer.state={path} contains no optimizer state_dict() (state and param_groups) "
            f"and no list of them, but {has}; save it with torch.save(optimizer.state_dict(), FILE)"
        )
    if any(is_sharded(v) for part in parts for s in part["state"].values() for v in s.values()):
        raise CheckpointError(
            f"optimizer.state={path} contains tensors of one rank of a sharded run: save whole "
            "ones, with full_state_dict()"
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


class _ParameterNames:
    """Finds the names of the parameters of another optimizer, which numbers them.

    If the file has no names, the n-th tensor of a rule and a shape belongs to the n-th such
    parameter of the model. Optimizers that sort parameters by size keep that order too.
    """

    def __init__(self, model: nn.Module, optimizer: Muon, path: Path) -> None:
        self.guessed = False
        """Whether the file has no names."""
        self.stepped = 0
        """Number of parameters that have a state in the file."""
        self._path = path
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        rules = {n: group["rule"] for group in optimizer.param_groups for n, _ in named(group)}
        # Unmatched names by rule, rows and columns.
        self._free: dict[tuple[str, int, int], list[str]] = defaultdict(list)
        for name, shape in self._shapes.items():
            if name in rules:
                self._free[(rules[name], *_flat(shape))].append(name)

    def convert(self, state_dict: StateDict, source: str) -> StateDict:
        """Convert a state dict of another optimizer to one of ours."""
        numbers: list[tuple[str, Tensor]] = []
        for group in state_dict["param_groups"]:
            names = group.get("param_names") or [None] * len(group["params"])
            for number, name in zip(group["params"], names, strict=True):
                name = number if isinstance(number, str) else name
                state = state_dict["state"].get(number, {})
                self.stepped += bool(state)
                name = self._check(name, state) if name else self._guess(number, state)
                numbers.append((name, torch.zeros(()).expand(self._shapes[name])))
        try:
            return convert_state_dict(state_dict, numbers, source)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"optimizer.state={self._path} is not a state of {SOURCES[source].what} "
                f"({type(error).__name__}: {error}); set optimizer.state_format to the optimizer "
                "that wrote it"
            ) from error

    def _check(self, name: str, state: Mapping[str, Any]) -> str:
        """Return a name of the file if the parameter exists and has the shape of its state."""
        if name not in self._shapes:
            raise CheckpointError(
                f"optimizer.state={self._path} has a parameter {name}, which this model does not "
                "have"
            )
        for key in RULE_OF:
            if key in state and _flat(state[key].shape) != _flat(self._shapes[name]):
                raise CheckpointError(
                    f"optimizer.state={self._path}: {key} of {name} has the shape "
                    f"{tuple(state[key].shape)}, and the parameter {self._shapes[name]}"
                )
        return name

    def _guess(self, number: Any, state: Mapping[str, Any]) -> str:
        """Return the next unmatched name of the rule and shape of a state."""
        self.guessed = True
        key = next((key for key in RULE_OF if key in state), None)
        if key is None:
            raise CheckpointError(
                f"optimizer.state={self._path} has no parameter names, and no state whose shape "
                f"would identify parameter {number}; save it from an optimizer of named parameters"
            )
        rule, shape = RULE_OF[key], tuple(state[key].shape)
        free = self._free[(rule, *_flat(shape))]
        if not free:
            raise CheckpointError(
                f"optimizer.state={self._path} has more parameters of the shape {shape} on {rule} "
                "than this model in this run; give a state of this model with named parameters"
            )
        return free.pop(0)


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of a tensor; some optimizers flatten tensors with more axes."""
    rows = shape[0] if shape else 1
    return rows, torch.Size(shape).numel() // max(1, rows)


def _load_without_options(optimizer: Muon, state_dict: StateDict, path: Path) -> None:
    """Load a state dict and restore the options of the optimizer."""
    kept = [dict(group) for group in optimizer.param_groups]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="parameter group"
            )  # it says that options stay
            optimizer.load_state_dict(state_dict)
    except CheckpointError as error:
        first, *lines = str(error).splitlines()
        more = [f"  and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        text = "\n".join([first, *lines[:LISTED], *more])
        raise CheckpointError(f"optimizer.state={path}: {text}") from error
    for group, options in zip(optimizer.param_groups, kept, strict=True):
        group.clear()
        group.update(options)
