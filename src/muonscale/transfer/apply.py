"""The multipliers of a model's parameters, and how they are applied: to weights and to groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from muonscale.errors import ConfigError
from muonscale.optim.parameters.collapse import collapse
from muonscale.optim.parameters.report import aligned
from muonscale.optim.parameters.roles import assign_roles
from muonscale.optim.rules.step_inputs import named
from muonscale.transfer.multipliers import ConventionT, Multipliers

DepthT = Literal["none", "complete_p"]
DEPTHS: tuple[DepthT, ...] = ("none", "complete_p")


@dataclass(frozen=True, kw_only=True)
class TransferRow:
    """One parameter, and how its hyper-parameters change."""

    name: str
    shape: tuple[int, ...]
    base: tuple[int, ...]
    """Shape at the base width."""
    role: str
    rule: str
    multipliers: Multipliers
    why: str
    """What was folded into it; empty where its shape alone decides."""
    fold: float = 1.0
    """The product of that. The multipliers have it in them."""


@dataclass(frozen=True, kw_only=True)
class Parametrization:
    """The multipliers of every parameter of a model, and what they are applied to."""

    convention: ConventionT
    depth: DepthT
    rows: dict[str, TransferRow]
    """By parameter name."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Options of `Muon` that the multipliers were computed for, where a group has none of its own."""

    @torch.no_grad()
    def scale_weights_(self, model: nn.Module) -> None:
        """Scale the freshly drawn weights of a model in place, once.

        Elementwise, so that it may be sharded; on the meta device nothing happens.

        Raises:
            ConfigError: for a model with other parameters.
        """
        parameters = {a.name: a.parameter for a in assign_roles(model)}
        if strange := parameters.keys() ^ self.rows.keys():
            raise ConfigError(
                f"the parametrization is of another model: {min(strange)} is in one only"
                "; give the one that was made of this model"
            )
        for name, parameter in parameters.items():
            m = self.rows[name].multipliers
            if m.init != 1:
                parameter.mul_(m.init)
            if m.shift != 0:
                parameter.add_(m.shift)

    def groups(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return parameter groups with lr, weight_decay and eps multiplied.

        A group whose parameters differ in their multipliers becomes several, the first of which keeps
        its name. What a group does not say of `defaults` is written into it, so that the optimizer
        takes the steps that the multipliers are for.

        Args:
            groups: from `parameter_groups`, for this model on any device, sharded or not.

        Raises:
            ConfigError: for a parameter that is not known, or decay of one that must not have any.
        """
        made: list[dict[str, Any]] = []
        taken = {str(group["name"]) for group in groups}
        for group in groups:
            parts: dict[tuple[Any, ...], list[str]] = {}
            for name, _ in named(group):
                m = self._row(name).multipliers
                parts.setdefault((m.lr, m.weight_decay, m.eps), []).append(name)
            for number, names in enumerate(parts.values()):
                part = self._part(group, names)
                if number:
                    part["name"] = _free(str(group["name"]), taken)
                made.append(part)
        return made

    def _row(self, name: str) -> TransferRow:
        if name not in self.rows:
            raise ConfigError(
                f"the parametrization is of another model: it has no {name}"
                "; give the one that was made of this model"
            )
        return self.rows[name]

    def _part(self, group: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
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
        if m.weight_decay is None and part.get("weight_decay", "that of Muon"):
            raise ConfigError(
                f"{names[0]} is a gain 1 + w with a factor folded in, and has weight_decay="
                f"{part.get('weight_decay', 'that of Muon')}, which would pull the gain to 1: give it none, at the base "
                f"width too, by the override {{{names[0]}: {{weight_decay: 0}}}}"
            )
        for option, factor in (("lr", m.lr), ("weight_decay", m.weight_decay), ("eps", m.eps)):
            if factor is None or factor == 1:
                continue
            if option not in part:
                raise ConfigError(
                    f"group {group['name']!r} has no {option} to multiply by {factor:g}: give "
                    f"parameter_groups the {option} that is right at the base width"
                )
            part[option] *= factor
        return part

    def table(self, *, full: bool = True) -> str:
        """Return the multipliers in columns; without `full`, what layers repeat as one line."""
        titles = ["parameter", "times", "shape", "base", "init", "lr", "decay", "eps", "folded in"]
        lines = collapse([(row.name, _facts(row)) for row in self.rows.values()], full=full)
        return aligned([titles, *([line.name, f"{line.count}x", *line.facts] for line in lines)])

    def summary(self) -> str:
        """Return one line for a console."""
        changed = sum(row.multipliers != Multipliers() for row in self.rows.values())
        return (
            f"transfer: {self.convention}, depth {self.depth}; {changed} of {len(self.rows)} parameters "
            "have multipliers"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        rows = [asdict(row) for row in self.rows.values()]
        return {"convention": self.convention, "depth": self.depth, "rows": rows}


def _free(name: str, taken: set[str]) -> str:
    """Return `name` with the first number that no group has, and take it."""
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
