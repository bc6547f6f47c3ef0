"""The verb `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Run folders, study folders or coordcheck folders."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the page (default: PATH/report for one path, report for several).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write an HTML page about runs or studies, with its figures.

    The page needs no network. Examples: `muonscale report runs/demo`; `muonscale report runs/muon
    runs/adamw --out compared`.
    """
    from muonscale.lab.report.folders import page_of
    from muonscale.lab.report.write import write_page

    page = page_of(paths)
    folder = out or (paths[0] / "report" if len(paths) == 1 else Path("report"))
    path = write_page(page, folder)
    count = len(page.charts)
    typer.echo(f"{path}, with {count} figures as PNG, SVG and CSV in {path.parent / 'figures'}")
