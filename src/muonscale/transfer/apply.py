"""Multipliers of a model's parameters, applied to weights and parameter groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from muonscale.errors import ConfigError
from muonscale.optim.parameters.collapse import collapse
from muonscale.optim.parameters.report import aligned
from muonscale.optim.parameters.roles import assign_roles
from muonscale.optim.rules.step_inputs import named
from muonscale.transfer.multipliers import Multipliers
from muonscale.transfer.options import ConventionT, DepthT


@dataclass(frozen=True, kw_only=True)
class TransferRow:
    """One parameter and its multipliers."""

    name: str
    shape: tuple[int, ...]
    base: tuple[int, ...]
    """Shape at the base width."""
    role: str
    rule: str
    multipliers: Multipliers
    why: str
    """The folds, in words; empty if there are none."""
    fold: float = 1.0
    """Product of the folds. The multipliers include it."""


@dataclass(frozen=True, kw_only=True)
class Parametrization:
    """The multipliers of every parameter of a model."""

    convention: ConventionT
    depth: DepthT
    rows: dict[str, TransferRow]
    """Rows by parameter name."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Options of `Muon` that the multipliers assume for groups that do not set them."""

    @torch.no_grad()
    def scale_weights_(self, model: nn.Module) -> None:
        """Scale the newly initialized weights of a model, in place. Call it once.

        The model may be sharded. On the meta device nothing happens.

        Raises:
            ConfigError: if the model has other parameters.
        """
        parameters = {a.name: a.parameter for a in assign_roles(model)}
        if strange := parameters.keys() ^ self.rows.keys():
            raise ConfigError(
                f"the parametrization is of another model: {min(strange)} is in only one of them. "
                "Call parametrize with this model"
            )
        for name, parameter in parameters.items():
            m = self.rows[name].multipliers
            if m.init != 1:
                parameter.mul_(m.init)
            if m.shift != 0:
                parameter.add_(m.shift)

    def groups(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return parameter groups with lr, weight_decay and eps multiplied.

        A group whose parameters have different multipliers is divided into several groups, the
        first of which keeps its name. Groups get the `defaults` that they do not set, because the
        multipliers depend on them.

        Args:
            groups: from `parameter_groups`, for this model on any device, sharded or not.

        Raises:
            ConfigError: if a parameter is unknown, a group lacks an option that has to be
                multiplied, or a parameter that must not decay has weight decay.
        """
        divided: list[dict[str, Any]] = []
        taken = {str(group["name"]) for group in groups}
        for group in groups:
            parts: dict[tuple[Any, ...], list[str]] = {}
            for name, _ in named(group):
                if name not in self.rows:
                    raise ConfigError(
                        f"the parametrization is of another model: it has no {name}. Call "
                        "parametrize with this model"
                    )
                m = self.rows[name].multipliers
                parts.setdefault((m.lr, m.weight_decay, m.eps), []).append(name)
            for number, names in enumerate(parts.values()):
                part = self._multiply(group, names)
                if number:
                    part["name"] = _find_free_name(str(group["name"]), taken)
                divided.append(part)
        return divided

    def _multiply(self, group: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
        m = self.rows[names[0]].multipliers
        chosen = set(names)
        kept = [(name, p) for name, p in named(group) if name in chosen]
        part: dict[str, Any] = {
            **self.defaults,
            **group,
            "params": [p for _, p in kept],
            "param_names": [name for name, _ in kept],
        }
        for key in ("matrices", "why"):
            part[key] = {n: v for n, v in group.get(key, {}).items() if n in chosen}
        if m.weight_decay is None and (decay := part.get("weight_decay", "that of Muon")):
            raise ConfigError(
                f"{names[0]} is a gain 1 + w with a factor folded in, and weight_decay={decay} "
                "would pull the gain to 1. Set its weight decay to 0, at the base width too, with "
                f"the override {{{names[0]}: {{weight_decay: 0}}}}"
            )
        for option, factor in (("lr", m.lr), ("weight_decay", m.weight_decay), ("eps", m.eps)):
            if factor is None or factor == 1:
                continue
            if option not in part:
                raise ConfigError(
                    f"group {group['name']!r} has no {option} to multiply by {factor:g}. Give "
                    f"parameter_groups the {option} of the base width"
                )
            part[option] *= factor
        return part

    def table(self, *, full: bool = True) -> str:
        """Return the multipliers as a table. Without `full`, layers that repeat are one line."""
        titles = ["parameter", "times", "shape", "base", "init", "lr", "decay", "eps", "folded in"]
        lines = collapse([(row.name, _facts(row)) for row in self.rows.values()], full=full)
        return aligned([titles, *([line.name, f"{line.count}x", *line.facts] for line in lines)])

    def summary(self) -> str:
        """Return a summary of one line."""
        changed = sum(row.multipliers != Multipliers() for row in self.rows.values())
        return (
            f"transfer: {self.convention}, depth {self.depth}; {changed} of {len(self.rows)} "
            "parameters have multipliers"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        rows = [asdict(row) for row in self.rows.values()]
        return {"convention": self.convention, "depth": self.depth, "rows": rows}


def _find_free_name(name: str, taken: set[str]) -> str:
    """Return `name` with the first number that is not in `taken`, and add it there."""
    stem = name.split("#")[0]
    number = 2
    while f"{stem}#{number}" in taken:
        number += 1
    taken.add(f"{stem}#{number}")
    return f"{stem}#{number}"


def _facts(row: TransferRow) -> tuple[str, ...]:
    m = row.multipliers
    shapes = ["x".join(map(str, shape)) or "scalar" for shape in (row.shape, row.base)]
    init = f"{m.init:g}" + (f"{m.shift:+g}" if m.shift else "")
    decay = "none" if m.weight_decay is None else f"{m.weight_decay:g}"
    return (*shapes, init, f"{m.lr:g}", decay, f"{m.eps:g}", row.why or "-")
