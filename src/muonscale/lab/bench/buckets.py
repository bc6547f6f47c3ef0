"""Divides a model's parameters into buckets that are stepped together when a step is measured."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from muonscale.optim.parameters.report import GroupingRow
from muonscale.optim.rules import MUON
from muonscale.optim.rules.base import RULES
from muonscale.optim.rules.step_inputs import Group, named


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Parameters of one rule; under a rule on matrices also of one shape."""

    title: str
    rule: str
    shape: tuple[int, ...] | None
    """The shape of each parameter; None if there are several."""
    matrices: tuple[tuple[int, int, int], ...]
    """(number, out, in) of the logical matrices of all parameters; empty on AdamW."""
    names: tuple[str, ...]
    """Names of the parameters that are measured."""
    count: int
    """The number of all parameters of this kind."""
    elements: int
    """Elements that are measured."""
    scale: float
    """All elements over those that are measured."""

    @property
    def on_matrices(self) -> bool:
        """Whether its rule is one on matrices."""
        return RULES[self.rule].on_matrices

    @property
    def fits_torch_muon(self) -> bool:
        """Whether torch.optim.Muon can step it: every parameter is one matrix."""
        return self.rule == MUON.name and self.shape is not None and len(self.shape) == 2


def make_buckets(rows: Sequence[GroupingRow], layers: int | None = None) -> list[Bucket]:
    """Return the buckets of a model: one for each Muon shape, and one of all AdamW parameters.

    Args:
        rows: the rows of the grouping report.
        layers: how many of the repeated layers are measured; None for all.
    """
    kinds: defaultdict[tuple[Any, ...], list[GroupingRow]] = defaultdict(list)
    for row in rows:
        if row.rule in RULES:
            on_matrices = RULES[row.rule].on_matrices
            kinds[(row.rule, row.shape, row.holds) if on_matrices else (row.rule,)].append(row)
    buckets = []
    for (rule, *shape), members in sorted(
        kinds.items(), key=lambda kind: (not RULES[kind[0][0]].on_matrices, -_elements(kind[1]))
    ):
        # Layers repeat where names differ in their numbers alone.
        seen: Counter[str] = Counter()
        measured = []
        for row in members:
            pattern = re.sub(r"\d+", "#", row.name)
            seen[pattern] += 1
            if layers is None or seen[pattern] <= layers:
                measured.append(row)
        matrices: Counter[tuple[int, int]] = Counter()
        for row in members:
            for number, out, in_ in row.holds:
                matrices[out, in_] += number
        buckets.append(
            Bucket(
                title="x".join(map(str, shape[0])) if shape else f"{RULES[rule].title}'s",
                rule=rule,
                shape=shape[0] if shape else None,
                matrices=tuple((number, out, in_) for (out, in_), number in matrices.items()),
                names=tuple(row.name for row in measured),
                count=len(members),
                elements=_elements(measured),
                scale=_elements(members) / _elements(measured),
            )
        )
    return buckets


def _elements(rows: Sequence[GroupingRow]) -> int:
    return sum(math.prod(row.shape) for row in rows)


def make_parameters(
    shapes: Mapping[str, tuple[int, ...]], device: torch.device
) -> dict[str, Parameter]:
    """Return parameters that are zero, with random gradients of full rank."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = {}
    for name, shape in shapes.items():
        parameter = Parameter(torch.zeros(shape, device=device))
        parameter.grad = torch.randn(shape, generator=generator, device=device)
        parameters[name] = parameter
    return parameters


def select_groups(
    groups: Sequence[Group], parameters: Mapping[str, Parameter]
) -> list[dict[str, Any]]:
    """Return the param groups with `parameters` in place of those of the same names."""
    selected = []
    for group in groups:
        names = [name for name, _ in named(group) if name in parameters]
        if names:
            own = {**group, "params": [parameters[name] for name in names], "param_names": names}
            for key in ("matrices", "why"):
                own[key] = {name: v for name, v in group[key].items() if name in parameters}
            selected.append(own)
    return selected
