"""Schedules of options other than the learning rate: weight decay, momentum, update RMS and so on.

The counterpart of `torch.optim.lr_scheduler.LambdaLR` for every numeric option of a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from muonscale.errors import ConfigError, nearest
from muonscale.optim.muon import Muon
from muonscale.optim.options import (
    COMMON,
    OPTIONS_OF,
    check_options_given,
    check_schedulable,
    names_of,
)

OptionFunction = Callable[[int], float]
"""Maps a step, from 0, to a value or a multiplier."""


@dataclass(frozen=True)
class _Scheduled:
    """One option of one group."""

    group: dict[str, Any]
    option: str
    function: OptionFunction
    own: float | None
    """The group's own value, which the function multiplies; None if the function gives the
    value."""


class OptionSchedule:
    """Sets options of an optimizer's groups as functions of the step.

    Call `step` after each optimizer step, as for a scheduler of torch. Learning rates have
    schedulers of their own.

    Examples:
        >>> import torch
        >>> from muonscale.optim.muon import Muon
        >>> optimizer = Muon(torch.nn.Linear(4, 4), lr=0.02)
        >>> schedule = OptionSchedule(
        ...     optimizer,
        ...     values={"momentum": lambda step: 0.85 + 0.1 * min(1.0, step / 300)},
        ...     multipliers={"weight_decay": lambda step: 1 - step / 1000},
        ... )
        >>> optimizer.param_groups[0]["momentum"]
        0.85
    """

    def __init__(
        self,
        optimizer: Muon,
        *,
        values: Mapping[str, OptionFunction] | None = None,
        multipliers: Mapping[str, OptionFunction] | None = None,
    ) -> None:
        """Set the options for step 0.

        Args:
            optimizer: the optimizer; its groups are changed.
            values: functions that give the value, by option (`momentum`, for all groups on a rule
                that has it) or by group and option (`embedding.weight_decay`; a group without a
                name has its number, `0.weight_decay`).
            multipliers: functions that give a multiple of the value that a group has now.

        Raises:
            ConfigError: for an option or a group that does not exist, that is no number, that is
                given twice, or for a value out of its range.
        """
        self._scheduled: dict[tuple[str, str], _Scheduled] = {}
        for key, function in (values or {}).items():
            self._add(optimizer, key, function, multiply=False)
        for key, function in (multipliers or {}).items():
            self._add(optimizer, key, function, multiply=True)
        self.set(0)

    def _add(self, optimizer: Muon, key: str, function: OptionFunction, *, multiply: bool) -> None:
        name, dot, option = key.rpartition(".")
        check_schedulable(option)
        named = [(_name_of(g, number), g) for number, g in enumerate(optimizer.param_groups)]
        groups = [(own, group) for own, group in named if not dot or own == name]
        if not groups:
            known = [own for own, _ in named]
            raise ConfigError(f"{key}: no parameter group {name!r}; {nearest(name, known)}")
        chosen = [
            (own, group)
            for own, group in groups
            if option in names_of(*COMMON, OPTIONS_OF[group["rule"]])
        ]
        if not chosen:
            rules = sorted({group["rule"] for _, group in groups})
            raise ConfigError(f"{key}: no group on a rule that has it (rules: {', '.join(rules)})")
        for group_name, group in chosen:
            place = (group_name, option)
            if place in self._scheduled:
                raise ConfigError(f"{key}: {'.'.join(place)} is scheduled twice; give it once")
            own = float(group[option]) if multiply else None
            self._scheduled[place] = _Scheduled(group, option, function, own)

    def set(self, step: int) -> None:
        """Set the options for a step.

        Raises:
            ConfigError: for a value out of the range of its option.
        """
        self._step = step
        for scheduled in self._scheduled.values():
            value = float(scheduled.function(step))  # not numpy's: it is saved with the group
            value = value if scheduled.own is None else scheduled.own * value
            check_options_given({scheduled.option: value})
            scheduled.group[scheduled.option] = value

    def step(self) -> None:
        """Set the options for the next step."""
        self.set(self._step + 1)

    def current(self) -> dict[str, float]:
        """Return the values by group and option."""
        return {".".join(place): s.group[s.option] for place, s in self._scheduled.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the own values that are multiplied."""
        own = {".".join(place): s.own for place, s in self._scheduled.items()}
        return {"step": self._step, "own": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the step of a saved schedule, after the optimizer's state is loaded.

        Raises:
            ConfigError: if other options are scheduled.
        """
        known = {".".join(place): place for place in self._scheduled}
        if known.keys() != state["own"].keys():
            raise ConfigError(
                f"the saved schedule has {sorted(state['own'])} and this one {sorted(known)}; "
                "schedule the same options"
            )
        for key, own in state["own"].items():
            old = self._scheduled[known[key]]
            self._scheduled[known[key]] = _Scheduled(old.group, old.option, old.function, own)
        self.set(state["step"])


def _name_of(group: Mapping[str, Any], number: int) -> str:
    """Return the name of a group; that of a group of plain tensors is its number."""
    return str(group.get("name", number))
