"""Code that the verbs `train` and `import` share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from muonscale.cli import is_first_process
from muonscale.errors import ConfigError

if TYPE_CHECKING:
    from muonscale.lab.config.load import Config
    from muonscale.lab.training.extend import Extension

DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan of the run, or with --json its configuration."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in run.path.")]
Extend = Annotated[
    bool,
    typer.Option(
        "--extend",
        help="Make the run RUN or RUN@STEP longer, in the new folder run.path; give train.tokens.",
    ),
]


def start(
    config: Config,
    *,
    dry_run: bool,
    resume: bool,
    as_json: bool,
    extension: Extension | None = None,
) -> None:
    """Train as configured, or print the plan of the run or its configuration, which is a recipe.

    Raises:
        ConfigError: for JSON of a run that is not only planned.
        typer.Exit: after Ctrl-C, SIGTERM or SIGHUP.
    """
    if as_json and not dry_run:
        raise ConfigError(
            f"{config.run.path}: --json prints the configuration of a run; give --dry-run too"
        )
    if as_json:
        from muonscale.lab.config.load import dump_config

        if is_first_process():
            typer.echo(dump_config(config), nl=False)
        return
    if dry_run:
        from muonscale.lab.training.dry_run import dry_run as describe

        if is_first_process():
            typer.echo(describe(config))
            if extension is not None:
                step = extension.choose_step(lambda text: typer.echo(f"warning: {text}", err=True))
                typer.echo(f"goes on from step {step} of {extension.source.path}")
        return

    if _is_finished(config, resume=resume):
        return
    from muonscale.lab.training.console import RunConsole
    from muonscale.lab.training.loop import train
    from muonscale.lab.training.signals import Interrupted

    try:
        train(config, resume=resume, console=RunConsole(), extension=extension)
    except Interrupted as stop:
        if is_first_process():
            typer.echo(str(stop), err=True)
        raise typer.Exit(stop.exit_code) from None


def _is_finished(config: Config, *, resume: bool) -> bool:
    """Say of a finished run that it is, and refuse what `train` would, before torch is imported.

    Under torchrun this is left to `train`, whose ranks have to agree.
    """
    from muonscale.lab.run_folder import RunFolder

    folder = RunFolder(config.run.path)
    if config.train.epochs is not None:  # its tokens are not known yet
        return False
    if "RANK" in os.environ or not folder.path.is_dir() or not folder.check_free(resume=resume):
        return False
    folder.check_same(config)
    if folder.result() is None:
        return False
    typer.echo(folder.finished_text)
    return True
