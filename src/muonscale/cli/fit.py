"""The verb `fit`: laws fitted to a table of runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muonscale.cli.arguments import Json

if TYPE_CHECKING:
    from muonscale.lab.fits.findings import Findings

app = typer.Typer(
    help="Fit a law to a table of runs, with intervals.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

TablePath = Annotated[
    Path, typer.Argument(metavar="TABLE", help="A .csv, .tsv or .jsonl file, a row for each run.")
]
By = Annotated[
    str | None,
    typer.Option(help="Column by which rows are groups, fitted apart (default: optimizer)."),
]
Reference = Annotated[
    str | None,
    typer.Option(help="Group that the others are compared with (default: adamw, else the first)."),
]
Resamples = Annotated[int, typer.Option(min=100, help="Tables drawn for the intervals.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draw.")]
Report = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Write a page with charts into this folder.")
]


@app.command()
def scaling(
    table: TablePath,
    law: Annotated[
        str,
        typer.Option(
            help="compute: L = a C^-b; chinchilla: L = E + A/N^alpha + B/D^beta; auto: the latter "
            "if the table has both N and D."
        ),
    ] = "auto",
    at: Annotated[
        list[float] | None, typer.Option(help="FLOPs to predict at; may be repeated.")
    ] = None,
    by: By = None,
    reference: Reference = None,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    as_json: Json = False,
    report: Report = None,
) -> None:
    """Fit a scaling law of the loss, and compare groups by FLOPs at equal loss.

    Columns: loss, and flops or parameters and tokens; optimizer for groups. Example:
    `muonscale fit scaling runs.csv --law compute --at 1e21`.
    """
    from muonscale.lab.fits.scaling import Asked, fit_scaling
    from muonscale.lab.fits.tables import read_table

    asked = Asked(
        law=law, by=by, reference=reference, at=tuple(at or ()), resamples=resamples, seed=seed
    )
    _show(fit_scaling(read_table(table), asked), as_json, report)


@app.command()
def batch(
    table: TablePath,
    base: Annotated[
        float | None,
        typer.Option(help="Batch that 20 % more data is counted from (default: the smallest)."),
    ] = None,
    by: By = None,
    reference: Reference = None,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    as_json: Json = False,
    report: Report = None,
) -> None:
    """Fit S(B) = Smin + Emin/B to the steps that a loss took, and find the critical batch size.

    Columns: batch, and steps or tokens; optimizer for groups, target for several losses. Example:
    `muonscale fit batch steps.csv`.
    """
    from muonscale.lab.fits.batch_table import AskedBatch, fit_batches
    from muonscale.lab.fits.tables import read_table

    asked = AskedBatch(by=by, reference=reference, base=base, resamples=resamples, seed=seed)
    _show(fit_batches(read_table(table), asked), as_json, report)


def _show(found: Findings, as_json: bool, report: Path | None) -> None:
    from muonscale.lab.fits.text import text

    typer.echo(found.json() if as_json else text(found))
    if report is None:
        return
    from muonscale.lab.fits.page import fit_page
    from muonscale.lab.report.write import write_page

    page = fit_page(found, f"muonscale {shlex.join(sys.argv[1:])}")
    typer.echo(f"report: {write_page(page, report)}", err=as_json)
