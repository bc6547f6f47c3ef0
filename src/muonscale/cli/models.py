"""Verbs about a model that is never built: `inspect` and `lr`."""

from __future__ import annotations

from typing import Annotated

import typer

from muonscale.cli.arguments import Json, Model, Overrides


def inspect(
    model: Model,
    overrides: Overrides = None,
    full: Annotated[
        bool, typer.Option("--full", help="A line for every parameter of every layer.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show which parameter of a model is on which optimizer rule, and why.

    The model is never allocated. Examples: `muonscale inspect demo`;
    `muonscale inspect path/to/config.json optimizer.lr=4.2e-4 --full`.
    """
    from muonscale.lab.targets import inspect as look

    seen = look(model, overrides or [])
    typer.echo(seen.json() if as_json else seen.text(full=full))


def lr(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="As for inspect.")],
    value: Annotated[float, typer.Option("--lr", min=0.0, help="Learning rate to convert.")],
    from_: Annotated[
        str, typer.Option("--from", metavar="SCALE", help="Shape factor it was tuned with.")
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="SCALE", help="Shape factor it is wanted for.")
    ] = "rms",
    rms: Annotated[float, typer.Option(help="Update RMS of rms and rms_exact.")] = 0.2,
    as_json: Json = False,
) -> None:
    """Convert a learning rate of Muon from one shape factor to another, for a model's matrices.

    A shape factor has our name (rms, spectral, keller, none) or another project's, such as
    original, match_rms_adamw or nvidia:spectral. Example:
    `muonscale lr --from original --to match_rms_adamw --model demo --lr 0.02`.
    """
    from muonscale.cli.convert_lr import conversion_json, conversion_text, convert
    from muonscale.lab.targets import inspect as look

    table = convert(look(model).routing, from_, to, rms)
    show = conversion_json if as_json else conversion_text
    typer.echo(show(table, value, from_, to))
