"""Collapse rows that repeat across layers and experts: `layers.{0..26}.mlp.down_proj.weight`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

Facts = tuple[str, ...]
Index = tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """Rows that say the same of names which differ in their numbers alone."""

    name: str
    count: int
    """Rows in it."""
    facts: Facts


def collapse(rows: Iterable[tuple[str, Facts]], *, full: bool = False) -> list[Line]:
    """Return rows (name, facts) as lines, at the place of the first row of each.

    Args:
        rows: names with parts between dots, and what is said of each.
        full: one line for each row.

    Examples:
        >>> rows = [(f"layers.{i}.up", ("4x8",)) for i in range(3)] + [("layers.3.up", ("4x9",))]
        >>> [(line.name, line.count) for line in collapse(rows)]
        [('layers.{0..2}.up', 3), ('layers.3.up', 1)]
    """
    if full:
        return [Line(name, 1, facts) for name, facts in rows]
    similar: dict[tuple[tuple[str, ...], Facts], list[Index]] = {}
    for name, facts in rows:
        parts = name.split(".")
        template = tuple("" if part.isdecimal() else part for part in parts)
        index = tuple(int(part) for part in parts if part.isdecimal())
        similar.setdefault((template, facts), []).append(index)
    return [
        Line(_fill(template, numbers), count, facts)
        for (template, facts), indices in similar.items()
        for numbers, count in _products(sorted(set(indices)))
    ]


def _products(indices: Sequence[Index]) -> list[tuple[list[str], int]]:
    """Cut a set of index tuples into products of ranges: what stands at each place, and how many."""
    if indices == [()]:
        return [([], 1)]
    tails = {first: tuple(i[1:] for i in part) for first, part in groupby(indices, lambda i: i[0])}
    products = []
    for tail in dict.fromkeys(tails.values()):
        firsts = [first for first in tails if tails[first] == tail]
        for numbers, count in _products(list(tail)):
            products.append(([_ranges(firsts), *numbers], len(firsts) * count))
    return products


def _ranges(numbers: list[int]) -> str:
    """Return 7, or {0..3}, or {0..3,7}."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(a) if a == b else f"{a}..{b}" for a, b in runs]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"


def _fill(template: tuple[str, ...], numbers: list[str]) -> str:
    left = iter(numbers)
    return ".".join(part or next(left) for part in template)
