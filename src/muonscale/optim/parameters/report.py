"""Which parameter is on which rule, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from muonscale.errors import GroupingError
from muonscale.optim.matrices.spec import PLAIN, matrix_shapes
from muonscale.optim.parameters.collapse import collapse
from muonscale.optim.parameters.groups import parameter_groups
from muonscale.optim.rules import ADAMW, MUON
from muonscale.optim.rules.base import RULES, rule_of
from muonscale.optim.rules.post_norm import resolve_post_norm
from muonscale.optim.rules.scale import shape_factor
from muonscale.optim.rules.step_inputs import named

FROZEN = "frozen"
"""In place of a rule: the parameter needs no gradient and is in no group."""


@dataclass(frozen=True, kw_only=True)
class GroupingRow:
    """One parameter in the grouping report."""

    name: str
    shape: tuple[int, ...]
    holds: tuple[tuple[int, int, int], ...]
    """(number, out, in) of the logical matrices that it holds; empty on an elementwise rule."""
    factors: tuple[float, ...]
    """What the polar factor of each of these is multiplied by, before `lr`; empty where the group
    does not say its `scale`, which groups have once they are an optimizer's."""
    role: str
    rule: str
    lr: float | None
    """None if the optimizer sets it or the parameter is frozen. The same holds for `weight_decay`."""
    weight_decay: float | None
    why: str
    guessed: bool = False
    """Whether this is a guess: nothing that is known excludes another role or other matrices."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def matrices(self) -> int:
        """Number of logical matrices that it holds; 0 on an elementwise rule."""
        return sum(number for number, _, _ in self.holds)


@dataclass(frozen=True)
class GroupingReport:
    """The rule of every parameter, and what decided it."""

    rows: tuple[GroupingRow, ...]

    def parameters(self, rule: str | None = None) -> int:
        """Return the number of elements on `rule`, or in all."""
        return sum(row.size for row in self.rows if rule in (None, row.rule))

    @property
    def num_matrices(self) -> int:
        """Number of logical matrices on Muon."""
        return sum(row.matrices for row in self.rows)

    @property
    def guesses(self) -> list[GroupingRow]:
        """Parameters whose role or matrices are a guess; an override ends it."""
        return [row for row in self.rows if row.guessed]

    def share(self, rule: str) -> float:
        """Return the part of all elements that is on `rule`, between 0 and 1."""
        return self.parameters(rule) / max(1, self.parameters())

    def matrix_shapes(self) -> list[tuple[int, int]]:
        """Return (out, in) of every logical matrix on Muon, as often as it is there."""
        return [(out, in_) for row in self.rows for n, out, in_ in row.holds for _ in range(n)]

    def summary(self) -> str:
        """Return one line per rule for a console."""
        lines = []
        for rule in sorted(RULES.values(), key=lambda rule: not rule.on_matrices):
            if not self.parameters(rule.name) and rule not in (MUON, ADAMW):
                continue
            held = sum(row.matrices for row in self.rows if row.rule == rule.name)
            noun = "matrix" if held == 1 else "matrices"
            matrices = f"{held:,} {noun}, " if rule.on_matrices else ""
            lines.append(f"{rule.title}: {matrices}{self._share(rule.name)}")
        if guesses := self.guesses:
            noun = "parameter" if len(guesses) == 1 else "parameters"
            lines.append(
                f"guessed: {len(guesses)} {noun}, first {guesses[0].name} on {guesses[0].rule} "
                f"({guesses[0].why})"
            )
        if frozen := self.parameters(FROZEN):
            lines.append(f"frozen: {frozen:,} parameters ({self.share(FROZEN):.1%})")
        return "\n".join(lines)

    def table(self, *, full: bool = True) -> str:
        """Return the rows in columns; without `full`, those that layers repeat as one line."""
        lines = collapse([(row.name, _facts(row)) for row in self.rows], full=full)
        titles = [title for title, _ in _COLUMNS]
        if any(line.count > 1 for line in lines):
            titles = [titles[0], "times", *titles[1:]]
            cells = [[line.name, f"{line.count}x", *line.facts] for line in lines]
        else:
            cells = [[line.name, *line.facts] for line in lines]
        return aligned([titles, *cells])

    def __str__(self) -> str:
        return f"{self.table(full=False)}\n\n{self.summary()}"

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        totals = {
            rule: {"parameters": self.parameters(rule), "share": self.share(rule)}
            for rule in dict.fromkeys([MUON.name, ADAMW.name, *(row.rule for row in self.rows)])
        }
        return {
            "parameters": self.parameters(),
            "matrices": self.num_matrices,
            "guessed": [row.name for row in self.guesses],
            "rules": totals,
            "rows": [{**asdict(row), "size": row.size} for row in self.rows],
        }

    def _share(self, rule: str) -> str:
        roles = dict.fromkeys(row.role for row in self.rows if row.rule == rule)
        named = ", ".join(roles) or "no parameters"
        return f"{self.parameters(rule):,} parameters ({self.share(rule):.1%}), {named}"


_COLUMNS: list[tuple[str, Callable[[GroupingRow], str]]] = [
    ("parameter", lambda row: row.name),
    ("shape", lambda row: "x".join(map(str, row.shape)) or "scalar"),
    ("matrices", lambda row: _matrices(row)),
    ("role", lambda row: row.role),
    ("rule", lambda row: row.rule),
    ("lr", lambda row: "-" if row.lr is None else f"{row.lr:g}"),
    ("decay", lambda row: "-" if row.weight_decay is None else f"{row.weight_decay:g}"),
    ("factor", lambda row: ", ".join(dict.fromkeys(f"{f:.4g}" for f in row.factors)) or "-"),
    ("why", lambda row: f"guessed: {row.why}" if row.guessed else row.why),
]


def _matrices(row: GroupingRow) -> str:
    """Return such as `128 of 1408x2048`, or 1 where the parameter is the matrix."""
    if not row.holds:
        return "-"
    counts: dict[tuple[int, int], int] = {}
    for number, out, in_ in row.holds:
        counts[out, in_] = counts.get((out, in_), 0) + number
    if row.holds == ((1, *row.shape),):
        return "1"
    return " + ".join(f"{n} of {out}x{in_}" for (out, in_), n in counts.items())


def _facts(row: GroupingRow) -> tuple[str, ...]:
    return tuple(show(row) for _, show in _COLUMNS[1:])


def aligned(cells: list[list[str]]) -> str:
    """Return lines of cells as text with every column as wide as its widest cell."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def grouping_report(
    groups: Iterable[Mapping[str, Any]] | Optimizer | nn.Module, model: nn.Module | None = None
) -> GroupingReport:
    """Return what `groups` say about every parameter; `print` shows it as a table.

    Args:
        groups: from `parameter_groups`; or an optimizer, whose groups are reported; or a model,
            whose groups `parameter_groups` makes.
        model: checked against the groups; its frozen parameters are listed too.

    Raises:
        GroupingError: if a trainable parameter of `model` is in no group or in two, or a group has
            a parameter that is not in `model`.

    Examples:
        >>> from torch import nn
        >>> from muonscale import parameter_groups
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 50))
        >>> print(grouping_report(parameter_groups(model, lr=1e-3)).summary())
        Muon: 1 matrix, 128 parameters (9.2%), hidden
        AdamW: 1,266 parameters (90.8%), embedding, head, norm
    """
    if isinstance(groups, nn.Module):
        model, groups = groups, parameter_groups(groups)
    groups = list(groups.param_groups if isinstance(groups, Optimizer) else groups)
    rows = [row for group in groups for row in _rows(group)]
    if model is not None:
        rows += _frozen(groups, model)
    return GroupingReport(tuple(rows))


def _frozen(groups: list[Mapping[str, Any]], model: nn.Module) -> list[GroupingRow]:
    """Check that the groups hold the trainable parameters, each once; return rows for the rest."""
    left = dict(zip(model.parameters(), (n for n, _ in model.named_parameters()), strict=True))
    seen: dict[Any, str] = {}
    gone: list[str] = []
    for group in groups:
        for name, parameter in named(group):
            if parameter in seen:
                raise GroupingError(
                    f"{name} is in two groups: {seen[parameter]} and {_name(group)}"
                    "; leave it out of one of them"
                )
            if parameter not in left:
                gone.append(f"{name} (group {_name(group)})")
            seen[parameter] = _name(group)
    if gone:
        raise GroupingError(
            f"the model does not have {', '.join(gone)}: give the model that the groups were built "
            "from; if its parameters were replaced since, as by resize_token_embeddings, build the "
            "groups anew"
        )
    rows = []
    for parameter, name in left.items():
        if parameter in seen:
            continue
        if parameter.requires_grad:
            raise GroupingError(
                f"{name} {tuple(parameter.shape)} is trainable and in no group: it would never be "
                "updated. Build the groups with parameter_groups(model, lr=...), or freeze it."
            )
        rows.append(_frozen_row(name, tuple(parameter.shape)))
    return rows


def _name(group: Mapping[str, Any]) -> str:
    return str(group.get("name", group.get("role", "without a name")))


def _frozen_row(name: str, shape: tuple[int, ...]) -> GroupingRow:
    return GroupingRow(
        name=name,
        shape=shape,
        holds=(),
        factors=(),
        role="-",
        rule=FROZEN,
        lr=None,
        weight_decay=None,
        why="requires_grad is False",
    )


def _rows(group: Mapping[str, Any]) -> list[GroupingRow]:
    rows = []
    for name, parameter in named(group):
        holds: tuple[tuple[int, int, int], ...] = ()
        if rule_of(group).on_matrices:
            layout = group.get("matrices", {}).get(name, PLAIN)
            holds = tuple(matrix_shapes(parameter.shape, layout))
        rows.append(
            GroupingRow(
                name=name,
                shape=tuple(parameter.shape),
                holds=holds,
                factors=_factors(group, holds),
                role=group.get("role", group.get("name", "")),
                rule=group["rule"],
                lr=_rate(group, "lr"),
                weight_decay=_rate(group, "weight_decay"),
                why=group.get("why", {}).get(name, ""),
                guessed=name in group.get("guessed", ()),
            )
        )
    return rows


def _rate(group: Mapping[str, Any], option: str) -> float | None:
    return float(group[option]) if option in group else None


def _factors(
    group: Mapping[str, Any], holds: tuple[tuple[int, int, int], ...]
) -> tuple[float, ...]:
    if "scale" not in group or "rms" not in group:
        return ()
    post_norm = resolve_post_norm(group.get("post_norm"))
    last = post_norm.last if post_norm else None
    return tuple(shape_factor(group["scale"], (o, i), group["rms"], last) for _, o, i in holds)
