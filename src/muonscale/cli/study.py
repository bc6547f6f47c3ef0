"""The verbs `study plan`, `study run`, `study status`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from muonscale.cli.arguments import Json, complete_studies
from muonscale.errors import ConfigError

if TYPE_CHECKING:
    from muonscale.lab.studies.study import Study

study = typer.Typer(
    name="study",
    help="Plan, run and evaluate many runs as one study.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


VERDICTS = {True: "PASS", False: "FAIL", None: "undecided"}

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="STUDY [key=value ...]",
        help="A study recipe, a YAML file or a study folder, then overrides of its keys.",
        autocompletion=complete_studies,
    ),
]


@study.command()
def plan(words: Words, as_json: Json = False) -> None:
    """List the runs of a study with tokens, FLOPs and hours.

    Nothing is written. The hours follow from finished runs; if there are none, a few steps are
    timed.
    Example: `muonscale study plan muon-adamw-nano executor.workers=2`.
    """
    from muonscale.lab.studies.engine import plan_study
    from muonscale.lab.studies.text import plan_json, study_plan_text

    found = _study(words)
    state, cost = plan_study(found)
    typer.echo(plan_json(found, state, cost) if as_json else study_plan_text(found, state, cost))


@study.command()
def run(
    words: Words,
    retry: Annotated[bool, typer.Option("--retry", help="Repeat failed runs.")] = False,
) -> None:
    """Do the missing runs of a study and write its report.

    The command may be stopped at any time; the next call continues. A failed run does not stop the
    others. The exit code is 1 if a run failed, if the study cannot continue, or if its verdict is
    not PASS.
    """
    from muonscale.lab.studies.engine import run_study

    found = _study(words)
    result = run_study(found, lambda line: typer.echo(line), retry=retry)
    path = found.config.path
    typer.echo(f"result in {path / 'result.json'}, report in {path / 'report' / 'report.html'}")
    for failed in result["failed"]:
        typer.echo(f"failed: {failed['run']}: {failed['reason']}", err=True)
    if result["failed"]:
        typer.echo("repeat failed runs with --retry", err=True)
    if result["stopped"]:
        typer.echo(f"stopped: {result['stopped']}", err=True)
    if "passed" in result:
        typer.echo(f"verdict: {VERDICTS[result['passed']]}")
    if result["failed"] or result["stopped"] or not result.get("passed", True):
        raise typer.Exit(1)


@study.command()
def status(
    words: Words,
    watch: Annotated[
        bool, typer.Option("--watch", help="Update the table until all runs have ended.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the state of every run of a study."""
    from rich.console import Console
    from rich.live import Live

    from muonscale.lab.studies.engine import look
    from muonscale.lab.studies.text import status_json, status_table

    found = _study(words)
    state = look(found)
    if as_json:
        typer.echo(status_json(found, state))
        return
    from muonscale.lab.console import WIDTH

    console = Console(highlight=False)
    if not console.is_terminal:  # a program reads it, so no line is wrapped or cut
        console.width = WIDTH
    if not watch:
        console.print(status_table(found, state))
        return
    with Live(status_table(found, state), console=console, auto_refresh=False) as live:
        while (state := look(found)).missing:
            live.update(status_table(found, state), refresh=True)
            time.sleep(2)
        live.update(status_table(found, state), refresh=True)


def _study(words: list[str]) -> Study:
    from muonscale.lab.studies.kinds import load_study

    names = [word for word in words if "=" not in word]
    if len(names) != 1:
        raise ConfigError(
            f"give one study, not {len(names)}{': ' if names else ''}{' and '.join(names)}; an "
            "override has the form key=value"
        )
    return load_study(names[0], [word for word in words if "=" in word])
