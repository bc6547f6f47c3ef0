"""The verbs `inspect` and `lr`, which do not allocate the model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from muonscale.cli.arguments import Json, Model, Overrides
from muonscale.errors import ConfigError

if TYPE_CHECKING:
    from muonscale.optim.migrate.convert_lr import ConversionTable


def inspect(
    model: Model,
    overrides: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="Print a line for every parameter.")] = False,
    as_json: Json = False,
) -> None:
    """Show the optimizer rule of every parameter, and the reason.

    The model is not allocated. Examples: `muonscale inspect demo`;
    `muonscale inspect path/to/config.json optimizer.lr=4.2e-4 --full`.
    """
    from muonscale.lab.targets import inspect as look

    seen = look(model, overrides or [])
    typer.echo(seen.json() if as_json else seen.text(full=full))


def lr(
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="A model, as for inspect.")
    ],
    value: Annotated[float, typer.Option("--lr", min=0.0, help="Learning rate to convert.")],
    from_: Annotated[
        str,
        typer.Option(
            "--from", metavar="SCALE", help="Shape factor that the learning rate was tuned with."
        ),
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="SCALE", help="Shape factor to convert it to.")
    ] = "rms",
    rms: Annotated[float, typer.Option(help="Update RMS of the factors rms and rms_exact.")] = 0.2,
    as_json: Json = False,
) -> None:
    """Convert a learning rate of Muon to another shape factor.

    The factor depends on the shapes of the model's matrices. Shape factors are rms, spectral,
    keller and none, or have the name of another project's option, such as original, match_rms_adamw
    or nvidia:spectral. Example:
    `muonscale lr --from original --to match_rms_adamw --model demo --lr 0.02`.
    """
    from muonscale.lab.targets import inspect as look
    from muonscale.optim.migrate.convert_lr import conversion_table

    report = look(model).groups
    shapes = report.matrix_shapes()
    if not shapes:
        raise ConfigError(
            f"none of the {len(report.rows)} parameters of this model is on Muon, so there is no "
            "learning rate to convert"
        )
    table = conversion_table(shapes, from_, to, rms)
    if as_json:
        tree = {"from": from_, "to": to, "lr": value, "converted_lr": value * table.best}
        typer.echo(json.dumps(tree | asdict(table), indent=2))
    else:
        typer.echo(_conversion_text(table, value, from_, to))


def _conversion_text(table: ConversionTable, lr: float, from_: str, to: str) -> str:
    """Return a conversion as text: a line per shape, the best single number, and its spread."""
    from muonscale.lab.console import table_text

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
