"""Translation of another optimizer's arguments to the options of `Muon`.

Arguments that are left out have the other optimizer's defaults, not those of `Muon`: a learning
rate belongs to the shape factor and the decay that it was tuned with.
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
    """The options of `Muon` that reproduce another optimizer."""

    muon: Mapping[str, Any]
    """Options of `Muon`, including `lr` and `weight_decay`."""
    adamw: Mapping[str, Any]
    """`lr` and `weight_decay` of the groups on AdamW, if they differ from those in `muon`."""
    rule: str = MUON.name
    """Rule of the matrices."""
    without_adamw: str = ""
    """Name of the other optimizer if it has no AdamW for the other parameters; otherwise empty."""

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
            model: as for `parameter_groups`.
            overrides: as for `parameter_groups`.
            adamw_lr: learning rate of the groups on AdamW. Required if the other optimizer has no
                AdamW.
            adamw_weight_decay: weight decay of these groups. By default it is that of the other
                optimizer's AdamW, or else that of the matrices.

        Raises:
            ConfigError: if `adamw_lr` is required and missing.
            MuonscaleError: as for `parameter_groups`.
        """
        own = {"lr": adamw_lr, "weight_decay": adamw_weight_decay}
        adamw = {**self.adamw, **{key: value for key, value in own.items() if value is not None}}
        groups = parameter_groups(model, overrides=overrides, rule=self.rule)
        for group in groups:
            on_adamw = not rule_of(group).on_matrices
            rates = {**self.muon, **(adamw if on_adamw else {})}
            if on_adamw and self.without_adamw and "lr" not in adamw and "lr" not in group:
                raise ConfigError(
                    f"{self.without_adamw} has no AdamW, but the group {group['name']!r} needs it: "
                    "set adamw_lr to the learning rate of your AdamW"
                )
            for key in ("lr", "weight_decay"):
                group.setdefault(key, rates[key])
        return groups


def translate_arguments(source: str, **arguments: Any) -> Translation:
    """Return the options of `Muon` that do what another optimizer does with `arguments`.

    Args:
        source: a row of `muonscale.optim.migrate.aliases.FOREIGN`: "torch", "keller", "moonlight",
            "dion", "timm", ...
        arguments: arguments of the other optimizer, except its parameters. Missing ones have the
            other optimizer's defaults.

    Raises:
        ConfigError: if the source or an argument is unknown, a required argument is missing, or a
            value has no counterpart.

    Examples:
        >>> from muonscale import Muon
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50))
        >>> found = translate_arguments("torch", lr=1e-3, adjust_lr_fn="match_rms_adamw")
        >>> optimizer = Muon(found.groups(model, adamw_lr=1e-3), **found.muon)
        >>> found.muon["scale"], found.muon["rms"], found.muon["weight_decay"]
        ('rms', 0.2, 0.1)
    """
    foreign = _find_foreign(source)
    for name in arguments:
        if name not in foreign.arguments:
            hint = nearest(name, foreign.arguments)
            raise ConfigError(f"{foreign.what} has no argument {name!r}: {hint}")
    given = {name: row.default for name, row in foreign.arguments.items()} | arguments
    muon: dict[str, Any] = dict(foreign.fixed)
    adamw: dict[str, Any] = {}
    for name, row in foreign.arguments.items():
        (adamw if row.adamw else muon).update(_translate(foreign, name, row, given))
    without_adamw = "" if foreign.has_adamw else foreign.what
    return Translation(muon=muon, adamw=adamw, rule=foreign.rule, without_adamw=without_adamw)


def _find_foreign(source: str) -> Foreign:
    if source in NO_COUNTERPART:
        missing = NO_COUNTERPART[source]
        raise ConfigError(
            f"{missing.what} has no counterpart: {missing.why}; accepted: {', '.join(FOREIGN)}"
        )
    if source not in FOREIGN:
        raise ConfigError(f"no known optimizer is called {source!r}: {nearest(source, FOREIGN)}")
    return FOREIGN[source]


def _translate(foreign: Foreign, name: str, row: Argument, given: Options) -> Options:
    """Return the options that replace one argument."""
    value = given[name]
    if not row.ours:
        if value is REQUIRED or row.only is None or any(_is_same(value, one) for one in row.only):
            return {}
        accepted = f"accepted: {', '.join(map(repr, row.only))}" if row.only else "leave it out"
        raise ConfigError(
            f"{foreign.what}: {name}={reprlib.repr(value)} has no counterpart ({row.note}); "
            f"{accepted}"
        )
    if value is REQUIRED:
        raise ConfigError(f"{foreign.what} needs {name}: it has no default")
    if row.to is not None:
        return row.to(given)
    for choice, options in (row.choices or {}).items():
        if _is_same(value, choice):
            return options
    if row.choices is None or row.adamw:
        return {row.ours: value}
    note = f" ({row.note})" if row.note else ""
    raise ConfigError(
        f"{foreign.what}: {name} is {value!r}; accepted: {', '.join(map(repr, row.choices))}{note}"
    )


def _is_same(value: object, other: object) -> bool:
    """Return whether two values of any type are equal. Bools are not numbers."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (value, other))
    return value is other or ((numbers or type(value) is type(other)) and value == other)


def find_renames(*sources: str) -> dict[str, str]:
    """Return our names of arguments that differ only in name, for some rows of `FOREIGN`."""
    found: dict[str, str] = {}
    for source in sources:
        for theirs, row in FOREIGN[source].arguments.items():
            if row.ours and row.to is None and row.choices is None and not row.adamw:
                assert found.setdefault(theirs, row.ours) == row.ours, theirs
    return found
