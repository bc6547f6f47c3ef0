"""Converts a learning rate from one shape factor to another, for the matrices of a model."""

from __future__ import annotations

import json
from dataclasses import asdict

from muonscale.errors import ConfigError
from muonscale.lab.console import table_text
from muonscale.optim.migrate.convert_lr import ConversionTable, conversion_table
from muonscale.optim.parameters.report import GroupingReport


def convert(routing: GroupingReport, from_: str, to: str, rms: float) -> ConversionTable:
    """Return the conversion of the learning rate of every matrix on Muon.

    Raises:
        ConfigError: for an unknown shape factor, or a model without matrices on Muon.
    """
    shapes = routing.matrix_shapes()
    if not shapes:
        raise ConfigError(
            f"none of the {len(routing.rows)} parameters of this model is on Muon, so there is no "
            "learning rate to convert"
        )
    return conversion_table(shapes, from_, to, rms)


def conversion_text(table: ConversionTable, lr: float, from_: str, to: str) -> str:
    """Return a conversion as text: a line per shape, the best single number, and its spread."""
    rows = sorted(table.rows, key=lambda row: row.factor)
    cells = [
        [f"{r.shape[0]}x{r.shape[1]}", f"{r.count:,}", f"{r.factor:.4g}", f"{lr * r.factor:.4g}"]
        for r in rows
    ]
    lines = [table_text(cells, ("matrix", "count", "factor", f"lr under {to}"))]
    lines.append(
        f"\nlr {lr:g} under {from_} is about {lr * table.best:.4g} under {to} "
        f"(factor {table.best:.4g}, the geometric mean over all matrices)"
    )
    if table.spread > 1.0001:
        lines.append(
            f"by shape it is {lr * rows[0].factor:.4g} to {lr * rows[-1].factor:.4g}, a factor of "
            f"{table.spread:.3g}: no single number is exact for every matrix"
        )
    else:
        lines.append("the factor is the same for every matrix: the conversion is exact")
    return "\n".join(lines)


def conversion_json(table: ConversionTable, lr: float, from_: str, to: str) -> str:
    """Return a conversion as JSON."""
    tree = {"from": from_, "to": to, "lr": lr, "converted_lr": lr * table.best, **asdict(table)}
    return json.dumps(tree, indent=2)
