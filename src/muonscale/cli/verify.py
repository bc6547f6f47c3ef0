"""The verb `verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from muonscale.cli.arguments import Arguments, Json, split_arguments


def verify(
    arguments: Arguments = None,
    *,
    layout: Annotated[
        str,
        typer.Option(
            metavar="LAYOUT",
            help="fsdp=N, hsdp=REPLICASxSHARDS or ddp=N, then tp=N, sp, ep=N; e.g. fsdp=2,tp=2.",
            show_default=False,
        ),
    ],
    steps: Annotated[int, typer.Option(min=1, help="Training steps to compare.")] = 5,
    full: Annotated[bool, typer.Option("--full", help="Print a line for every parameter.")] = False,
    as_json: Json = False,
) -> None:
    """Check that a layout trains as one process does.

    The first steps of the run are done on several processes of this machine, and again on one, with
    the same data. Losses, raw gradients and weights may differ only by rounding. The exit code is 0
    if they do, else 1. Examples: `muonscale verify demo --layout fsdp=2`;
    `muonscale verify my.yaml model.fields.num_hidden_layers=2 --layout fsdp=2,tp=2`.
    """
    from muonscale.lab.config.load import load_config
    from muonscale.lab.console import stderr_console
    from muonscale.lab.parallel.topology import parse_layout
    from muonscale.lab.training.console import RunConsole
    from muonscale.lab.verify.check import verify as check
    from muonscale.lab.verify.text import verification_json, verification_text

    topology = parse_layout(layout)
    recipe, overrides = split_arguments(arguments or [])
    progress = RunConsole(stderr_console())
    found = check(load_config(recipe, overrides), topology, steps, progress)
    typer.echo(verification_json(found) if as_json else verification_text(found, full=full))
    if not found.comparison.same:
        raise typer.Exit(1)
