"""The verb `fit`: laws fitted to a table of runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from muonscale.cli.arguments import Json, read_path

app = typer.Typer(
    help="Fit a law to a table of runs, with intervals.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

TablePath = Annotated[
    Path,
    typer.Argument(
        parser=read_path, metavar="TABLE", help="A .csv, .tsv or .jsonl file, a row for each run."
    ),
]
By = Annotated[
    str | None,
    typer.Option(help="Column whose values are the groups to fit (default: optimizer)."),
]
Reference = Annotated[
    str | None,
    typer.Option(help="Group that the others are compared with (default: adamw, else the first)."),
]
Law = Annotated[
    str,
    typer.Option(help="A law listed below; auto: the first that the table has the columns of."),
]
Resamples = Annotated[int, typer.Option(min=100, help="Number of tables drawn for the intervals.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of these tables.")]
Report = Annotated[
    Path | None,
    typer.Option(
        parser=read_path, metavar="FOLDER", help="Write a page with charts into this folder."
    ),
]


class _LawCommand(TyperCommand):
    """A command whose help ends with the laws that it fits."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the name and the formula of each law."""
        from muonscale.lab.fits.laws.registry import LAWS

        measured = {"scaling": "loss", "batch": "steps"}[self.name or ""]
        laws = [law for law in LAWS.values() if measured == law.MEASURED]
        with formatter.section("Laws"):
            formatter.write_dl([(law.NAME, law.FORMULA) for law in laws])


@app.command(cls=_LawCommand)
def scaling(
    table: TablePath,
    law: Law = "auto",
    at: Annotated[
        list[float] | None, typer.Option(help="More FLOPs to predict at; may be repeated.")
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
    _fit(
        table,
        as_json,
        report,
        measured="loss",
        law=law,
        at=tuple(at or ()),
        by=by,
        reference=reference,
        resamples=resamples,
        seed=seed,
    )


@app.command(cls=_LawCommand)
def batch(
    table: TablePath,
    law: Law = "auto",
    base: Annotated[
        float | None,
        typer.Option(
            help="Batch size from which 20 % more data is counted (default: the smallest)."
        ),
    ] = None,
    by: By = None,
    reference: Reference = None,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    as_json: Json = False,
    report: Report = None,
) -> None:
    """Fit a law of the steps to a loss by batch size, and find the critical batch size.

    Columns: batch, and steps or tokens; optimizer for groups, target for several losses. Example:
    `muonscale fit batch steps.csv`.
    """
    _fit(
        table,
        as_json,
        report,
        measured="steps",
        law=law,
        at=() if base is None else (base,),
        by=by,
        reference=reference,
        resamples=resamples,
        seed=seed,
    )


def _fit(table: Path, as_json: bool, report: Path | None, **request: Any) -> None:
    from muonscale.lab.fits.fit_table import FitRequest, fit_table
    from muonscale.lab.fits.tables import read_table
    from muonscale.lab.fits.text import format_findings

    found = fit_table(read_table(table), FitRequest(**request))
    typer.echo(found.json() if as_json else format_findings(found))
    if report is None:
        return
    from muonscale.lab.fits.page import fit_page
    from muonscale.lab.report.write import write_page

    page = fit_page(found, f"muonscale {shlex.join(sys.argv[1:])}")
    written = write_page(page, report, "choose another folder with --report")
    typer.echo(f"report: {written}", err=as_json)
