"""The verb `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muonscale.cli.arguments import read_path
from muonscale.errors import ConfigError

PORT = 8765
"""The port of a live page."""


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            parser=read_path,
            metavar="PATH...",
            help="Run folders, study folders or coordcheck folders.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=read_path,
            metavar="FOLDER",
            help="Folder of the page (default: PATH/report for one path, report for several).",
            show_default=False,
        ),
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Write no files; show the page on this machine and keep it up to date, until "
            "Ctrl-C.",
        ),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="Port of --serve (default: 8765).", min=0, max=65535),
    ] = None,
) -> None:
    """Write an HTML page about runs or studies, with its figures.

    The page needs no network. Examples: `muonscale report runs/demo`; `muonscale report runs/muon
    runs/adamw --out compared`; `muonscale report runs/demo --serve`.
    """
    if live:
        _serve(paths, out, PORT if port is None else port)
        return
    if port is not None:
        raise ConfigError(f"--port {port} is of --serve; give both, or neither")
    from muonscale.lab.report.folders import page_of
    from muonscale.lab.report.write import write_page

    page = page_of(paths)
    folder = out or (paths[0] / "report" if len(paths) == 1 else Path("report"))
    path = write_page(page, folder)
    count = len(page.charts)
    typer.echo(f"{path}, with {count} figures as PNG, SVG and CSV in {path.parent / 'figures'}")


def _serve(paths: list[Path], out: Path | None, port: int) -> None:
    from muonscale.lab.report.serve import HOST, page_server, serve

    if out is not None:
        raise ConfigError(f"--serve writes no files; leave out --out {out}, or leave out --serve")
    server = page_server(paths, port)
    typer.echo(f"http://{HOST}:{server.server_port}/ shows the page until Ctrl-C")
    serve(server)
