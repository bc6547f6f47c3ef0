"""The verb `coordcheck`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muonscale.cli.arguments import Json, Model, Overrides, read_path
from muonscale.errors import ConfigError


def coordcheck(
    model: Model,
    overrides: Overrides = None,
    widths: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="Three widths or more; the smallest is the base (default: four, 8x apart).",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds per width.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps per run.")] = 6,
    convention: Annotated[
        str | None,
        typer.Option(
            help="spectral, adam_table or standard (default: transfer.convention).",
            show_default=False,
        ),
    ] = None,
    grow: Annotated[
        str, typer.Option(help="What grows with the width: heads or head_dim.")
    ] = "heads",
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=read_path,
            metavar="FOLDER",
            help="Write coordcheck.json, .png and .svg to this folder.",
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print a line for every measurement.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check that the training dynamics do not depend on the width.

    The model is trained for a few steps at several widths. The values of optimizer.* are those of
    the smallest width. The size and the change of the outputs, and the norms of weights and
    updates, must not grow or shrink with the width. The exit code is 0 if they do not, and 1 if
    they do or if the runs do not decide it. Examples: `muonscale coordcheck llama-nano`;
    `muonscale coordcheck my.yaml optimizer.lr=0.01 --widths 64,128,256,512 --out checks/mine`.
    """
    from muonscale.lab.console import stderr_console
    from muonscale.lab.coordcheck.plan import CoordcheckRequest, plan_check
    from muonscale.lab.coordcheck.result import check_facts
    from muonscale.lab.coordcheck.run import measure
    from muonscale.lab.coordcheck.text import check_text
    from muonscale.lab.files import to_json
    from muonscale.lab.training.console import RunConsole

    request = CoordcheckRequest(
        target=model,
        overrides=overrides or [],
        widths=None if widths is None else _numbers(widths),
        seeds=seeds,
        steps=steps,
        convention=convention,
        grow=grow,  # pyrefly: ignore [bad-argument-type]
        batch_tokens=batch_tokens,
    )
    plan = plan_check(request)
    console = RunConsole(stderr_console())
    facts = check_facts(measure(plan, console))
    if out is not None:
        from muonscale.lab.coordcheck.page import write_check

        write_check(facts, out)
    typer.echo(to_json(facts) if as_json else check_text(facts, full=full))
    if not facts["passed"]:
        raise typer.Exit(1)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--widths {text} must be whole numbers separated by commas, such as 32,64,128"
        ) from None
