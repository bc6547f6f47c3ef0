"""A model's parameters by shape: what is stepped together when a step is measured."""

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

Facts = tuple[str, tuple[int, ...], tuple[tuple[int, int, int], ...]]
"""Rule, shape, and what it holds; the latter two are empty on AdamW."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters of one rule; under Muon of one shape too."""

    title: str
    rule: str
    shape: tuple[int, ...] | None
    """None where there are several."""
    matrices: tuple[tuple[int, int, int], ...]
    """(number, out, in) of the logical matrices of all parameters; empty on AdamW."""
    names: tuple[str, ...]
    """Of the parameters that are measured."""
    count: int
    """Parameters there are of this kind."""
    elements: int
    """Of those that are measured."""
    scale: float
    """Elements there are for one that is measured."""

    @property
    def on_matrices(self) -> bool:
        """Whether its rule is one on matrices."""
        return RULES[self.rule].on_matrices

    @property
    def plain(self) -> bool:
        """Whether torch.optim.Muon can step it: every parameter is one matrix."""
        return self.rule == MUON.name and self.shape is not None and len(self.shape) == 2


def parts_of(rows: Sequence[GroupingRow], layers: int | None = None) -> list[Part]:
    """Return the parts of a model: a Muon part for each shape, and one of all AdamW parameters.

    Args:
        rows: of the grouping report.
        layers: how many of the layers that repeat are measured; None for all.
    """
    kinds: defaultdict[Facts, list[GroupingRow]] = defaultdict(list)
    for row in rows:
        if row.rule in RULES:
            on_matrices = RULES[row.rule].on_matrices
            facts = (row.rule, row.shape, row.holds) if on_matrices else (row.rule, (), ())
            kinds[facts].append(row)
    ordered = sorted(
        kinds.items(), key=lambda kind: (not RULES[kind[0][0]].on_matrices, -_elements(kind[1]))
    )
    return [_part(facts, found, _first(found, layers)) for facts, found in ordered]


def _part(facts: Facts, found: Sequence[GroupingRow], taken: Sequence[GroupingRow]) -> Part:
    rule, shape, _ = facts
    held: Counter[tuple[int, int]] = Counter()
    for row in found:
        for number, out, in_ in row.holds:
            held[out, in_] += number
    return Part(
        title="x".join(map(str, shape)) if RULES[rule].on_matrices else f"{RULES[rule].title}'s",
        rule=rule,
        shape=shape if RULES[rule].on_matrices else None,
        matrices=tuple((number, out, in_) for (out, in_), number in held.items()),
        names=tuple(row.name for row in taken),
        count=len(found),
        elements=_elements(taken),
        scale=_elements(found) / _elements(taken),
    )


def _elements(rows: Sequence[GroupingRow]) -> int:
    return sum(math.prod(row.shape) for row in rows)


def _first(rows: Sequence[GroupingRow], layers: int | None) -> list[GroupingRow]:
    """Return the rows of the first layers: names that differ in their numbers alone repeat."""
    seen: Counter[str] = Counter()
    taken = []
    for row in rows:
        pattern = re.sub(r"\d+", "#", row.name)
        seen[pattern] += 1
        if layers is None or seen[pattern] <= layers:
            taken.append(row)
    return taken


def drawn(shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> dict[str, Parameter]:
    """Return parameters that are zero, with full-rank random gradients."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = {}
    for name, shape in shapes.items():
        parameter = Parameter(torch.zeros(shape, device=device))
        parameter.grad = torch.randn(shape, generator=generator, device=device)
        parameters[name] = parameter
    return parameters


def groups_of(groups: Sequence[Group], parameters: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    """Return the groups of an optimizer for these parameters, which stand for the ones in them."""
    found = []
    for group in groups:
        here = [name for name, _ in named(group) if name in parameters]
        if not here:
            continue
        own = dict(group)
        own["params"], own["param_names"] = [parameters[name] for name in here], here
        for key in ("matrices", "why"):
            own[key] = {name: value for name, value in group[key].items() if name in parameters}
        found.append(own)
    return found
