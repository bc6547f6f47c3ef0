"""From the arguments of another project's optimizer to the options of `Muon`.

Its defaults count as given, since they differ from ours: a learning rate goes with the shape
factor and the decay that it was tuned with.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from muonscale.errors import ConfigError, nearest
from muonscale.optim.migrate.aliases import FOREIGN, NO_COUNTERPART
from muonscale.optim.migrate.aliases.argument import REQUIRED, Argument, Foreign, Options
from muonscale.optim.parameters.groups import Overrides, parameter_groups
from muonscale.optim.rules import MUON
from muonscale.optim.rules.base import rule_of


@dataclass(frozen=True, kw_only=True)
class Translation:
    """What another optimizer does, in our words."""

    muon: Mapping[str, Any]
    """Options of `Muon`, `lr` and `weight_decay` among them."""
    adamw: Mapping[str, Any]
    """`lr` and `weight_decay` of the groups on AdamW, where they have their own."""
    rule: str = MUON.name
    """What matrices are on."""
    alone: str = ""
    """What the other optimizer is called, if it has no AdamW for the rest."""

    def groups(
        self,
        model: nn.Module,
        overrides: Overrides | None = None,
        *,
        adamw_lr: float | None = None,
        adamw_weight_decay: float | None = None,
    ) -> list[dict[str, Any]]:
        """Return the parameter groups of `model` with these learning rates and decays.

        Args:
            model: as of `parameter_groups`.
            overrides: likewise.
            adamw_lr: of the groups on AdamW; needed where the other optimizer has none of its own.
            adamw_weight_decay: of these groups; that of the matrices when the other has none either.

        Raises:
            ConfigError: without an `adamw_lr` that is needed.
            MuonscaleError: as `parameter_groups`.
        """
        own = {"lr": adamw_lr, "weight_decay": adamw_weight_decay}
        adamw = {**self.adamw, **{key: value for key, value in own.items() if value is not None}}
        groups = parameter_groups(model, overrides=overrides, rule=self.rule)
        for group in groups:
            on_adamw = not rule_of(group).on_matrices
            rates = {**self.muon, **(adamw if on_adamw else {})}
            if on_adamw and self.alone and "lr" not in adamw and "lr" not in group:
                raise ConfigError(
                    f"{self.alone} has no AdamW, and the group {group['name']!r} is on it: give adamw_lr, "
                    "the rate that your AdamW had"
                )
            for key in ("lr", "weight_decay"):
                group.setdefault(key, rates[key])
        return groups


def translate_arguments(source: str, **arguments: Any) -> Translation:
    """Return what another optimizer does with `arguments`, as options of `Muon`.

    Args:
        source: a row of `muonscale.optim.migrate.aliases.FOREIGN`: "torch", "keller", "moonlight", "dion",
            "timm", ...
        arguments: of the other optimizer, without its parameters. What is left out has the other
            optimizer's default.

    Raises:
        ConfigError: for an unknown source or argument, a missing one, or a value that has no
            counterpart.

    Example:
        >>> from muonscale import Muon
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50))
        >>> found = translate_arguments("torch", lr=1e-3, adjust_lr_fn="match_rms_adamw")
        >>> optimizer = Muon(found.groups(model, adamw_lr=1e-3), **found.muon)
        >>> found.muon["scale"], found.muon["rms"], found.muon["weight_decay"]
        ('rms', 0.2, 0.1)
    """
    foreign = _foreign(source)
    for name in arguments:
        if name not in foreign.arguments:
            hint = nearest(name, foreign.arguments)
            raise ConfigError(f"{foreign.what} has no argument {name!r}: {hint}")
    given = {name: row.default for name, row in foreign.arguments.items()} | arguments
    muon: dict[str, Any] = dict(foreign.fixed)
    adamw: dict[str, Any] = {}
    for name, row in foreign.arguments.items():
        (adamw if row.adamw else muon).update(_options(foreign, name, row, given))
    alone = foreign.what if foreign.alone else ""
    return Translation(muon=muon, adamw=adamw, rule=foreign.rule, alone=alone)


def _foreign(source: str) -> Foreign:
    if source in NO_COUNTERPART:
        missing = NO_COUNTERPART[source]
        raise ConfigError(
            f"{missing.what} has no counterpart: {missing.why}; accepted: {', '.join(FOREIGN)}"
        )
    if source not in FOREIGN:
        raise ConfigError(f"no other optimizer is called {source!r}: {nearest(source, FOREIGN)}")
    return FOREIGN[source]


def _options(foreign: Foreign, name: str, row: Argument, given: Options) -> Options:
    value = given[name]
    if value is REQUIRED and row.ours:
        raise ConfigError(f"{foreign.what} needs {name}: it has no default")
    if value is REQUIRED or not row.ours:
        _check_left_out(foreign, name, row, value)
        return {}
    if row.to is not None:
        return row.to(given)
    if row.choices is None:
        return {row.ours: value}
    return _chosen(foreign, name, row, value)


def _check_left_out(foreign: Foreign, name: str, row: Argument, value: object) -> None:
    if value is REQUIRED or row.only is None or _among(value, row.only):
        return
    accepted = f"accepted: {', '.join(map(repr, row.only))}" if row.only else "leave it out"
    raise ConfigError(
        f"{foreign.what}: {name}={reprlib.repr(value)} has no counterpart ({row.note}); {accepted}"
    )


def _chosen(foreign: Foreign, name: str, row: Argument, value: object) -> Options:
    for choice, options in (row.choices or {}).items():
        if _among(value, (choice,)):
            return options
    if row.adamw:  # None stands for the value of all groups, everything else for itself
        return {row.ours: value}
    accepted = ", ".join(map(repr, row.choices or {}))
    note = f" ({row.note})" if row.note else ""
    raise ConfigError(f"{foreign.what}: {name} is {value!r}; accepted: {accepted}{note}")


def _among(value: object, values: tuple[object, ...]) -> bool:
    """Return whether `value` is one of `values`; it may be anything, a tensor too."""
    for one in values:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (value, one))
        if value is one or ((numbers or type(value) is type(one)) and value == one):
            return True
    return False


def find_renames(*sources: str) -> dict[str, str]:
    """Return which arguments of rows of `FOREIGN` are options of ours, under whatever name."""
    found: dict[str, str] = {}
    for source in sources:
        for theirs, row in FOREIGN[source].arguments.items():
            if row.ours and row.to is None and row.choices is None and not row.adamw:
                assert found.setdefault(theirs, row.ours) == row.ours, theirs
    return found
