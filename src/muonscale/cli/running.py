"""Code that the verbs `train` and `import` share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from muonscale.cli import is_first_process

if TYPE_CHECKING:
    from muonscale.lab.config.load import Config

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan of the run and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in run.path.")]


def start(config: Config, *, dry_run: bool, resume: bool) -> None:
    """Train as configured, or print the plan of the run.

    Raises:
        typer.Exit: after Ctrl-C, SIGTERM or SIGHUP.
    """
    if dry_run:
        from muonscale.lab.training.dry_run import dry_run as describe

        if is_first_process():
            typer.echo(describe(config))
        return

    from muonscale.lab.training.console import RunConsole
    from muonscale.lab.training.loop import train
    from muonscale.lab.training.signals import Interrupted

    try:
        train(config, resume=resume, console=RunConsole())
    except Interrupted as stop:
        if is_first_process():
            typer.echo(str(stop), err=True)
        raise typer.Exit(stop.exit_code) from None
