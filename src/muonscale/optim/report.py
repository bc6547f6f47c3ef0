"""The routing report: which parameter is on which rule, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from muonscale.optim.matrices import PLAIN, matrix_shapes


@dataclass(frozen=True, kw_only=True)
class RoutingRow:
    """One parameter in the routing report."""

    name: str
    shape: tuple[int, ...]
    matrices: int
    """Logical matrices that Muon orthogonalises in it; 0 on AdamW."""
    role: str
    rule: str
    lr: float
    weight_decay: float
    why: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class RoutingReport:
    """What every parameter was routed to."""

    rows: tuple[RoutingRow, ...]

    def parameters(self, rule: str | None = None) -> int:
        """Return the number of elements on `rule`, or in all."""
        return sum(row.size for row in self.rows if rule in (None, row.rule))

    @property
    def muon_matrices(self) -> int:
        """Number of logical matrices on Muon."""
        return sum(row.matrices for row in self.rows)

    def share(self, rule: str) -> float:
        """Return the part of all elements that is on `rule`, between 0 and 1."""
        return self.parameters(rule) / max(1, self.parameters())

    def summary(self) -> str:
        """Return one line per rule for a console."""
        muon, adamw = self.parameters("muon"), self.parameters("adamw")
        noun = "matrix" if self.muon_matrices == 1 else "matrices"
        return (
            f"Muon: {self.muon_matrices} {noun}, {muon:,} parameters "
            f"({self.share('muon'):.1%}), {self._roles('muon')}\n"
            f"AdamW: {adamw:,} parameters ({self.share('adamw'):.1%}), {self._roles('adamw')}"
        )

    def table(self) -> str:
        """Return one line per parameter, in columns."""
        columns: list[tuple[str, Callable[[RoutingRow], str]]] = [
            ("parameter", lambda row: row.name),
            ("shape", lambda row: "x".join(map(str, row.shape)) or "scalar"),
            ("matrices", lambda row: str(row.matrices or "-")),
            ("role", lambda row: row.role),
            ("rule", lambda row: row.rule),
            ("lr", lambda row: f"{row.lr:g}"),
            ("decay", lambda row: f"{row.weight_decay:g}"),
            ("why", lambda row: row.why),
        ]
        cells = [[title for title, _ in columns]]
        cells += [[show(row) for _, show in columns] for row in self.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
        return "\n".join(lines)

    def _roles(self, rule: str) -> str:
        roles = dict.fromkeys(row.role for row in self.rows if row.rule == rule)
        return ", ".join(roles) or "no parameters"


def routing_report(groups: Iterable[Mapping[str, Any]]) -> RoutingReport:
    """Return what `groups` say about every parameter.

    Args:
        groups: from `parameter_groups`, or the `param_groups` of a `Muon`.

    Example:
        >>> from torch import nn
        >>> from muonscale import parameter_groups
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 50))
        >>> print(routing_report(parameter_groups(model, lr=1e-3)).summary())
        Muon: 1 matrix, 128 parameters (9.2%), hidden
        AdamW: 1,266 parameters (90.8%), embedding, head, norm
    """
    return RoutingReport(tuple(row for group in groups for row in _rows(group)))


def _rows(group: Mapping[str, Any]) -> list[RoutingRow]:
    rows = []
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        matrices = 0
        if group["rule"] == "muon":
            layout = group.get("matrices", {}).get(name, PLAIN)
            matrices = sum(n for n, _, _ in matrix_shapes(parameter.shape, layout))
        rows.append(
            RoutingRow(
                name=name,
                shape=tuple(parameter.shape),
                matrices=matrices,
                role=group.get("role", group.get("name", "")),
                rule=group["rule"],
                lr=float(group["lr"]),
                weight_decay=float(group["weight_decay"]),
                why=group.get("why", {}).get(name, ""),
            )
        )
    return rows
