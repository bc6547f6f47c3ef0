"""The verbs `inspect` and `lr`, which do not allocate the model."""

from __future__ import annotations

from typing import Annotated

import typer

from muonscale.cli.arguments import Json, Model, Overrides


def inspect(
    model: Model,
    overrides: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="Print a line for every parameter.")] = False,
    as_json: Json = False,
) -> None:
    """Show the optimizer rule of every parameter, and the reason.

    The model is not allocated. Examples: `muonscale inspect demo`;
    `muonscale inspect path/to/config.json optimizer.lr=4.2e-4 --full`.
    """
    from muonscale.lab.targets import inspect as look

    seen = look(model, overrides or [])
    typer.echo(seen.json() if as_json else seen.text(full=full))


def lr(
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="A model, as for inspect.")
    ],
    value: Annotated[float, typer.Option("--lr", min=0.0, help="Learning rate to convert.")],
    from_: Annotated[
        str,
        typer.Option(
            "--from", metavar="SCALE", help="Shape factor that the learning rate was tuned with."
        ),
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="SCALE", help="Shape factor to convert it to.")
    ] = "rms",
    rms: Annotated[float, typer.Option(help="Update RMS of the factors rms and rms_exact.")] = 0.2,
    as_json: Json = False,
) -> None:
    """Convert a learning rate of Muon to another shape factor.

    The factor depends on the shapes of the model's matrices. Shape factors are rms, spectral, keller
    and none, or have the name of another project's option, such as original, match_rms_adamw or
    nvidia:spectral. Example: `muonscale lr --from original --to match_rms_adamw --model demo --lr 0.02`.
    """
    from muonscale.cli.convert_lr import conversion_json, conversion_text, convert
    from muonscale.lab.targets import inspect as look

    table = convert(look(model).routing, from_, to, rms)
    show = conversion_json if as_json else conversion_text
    typer.echo(show(table, value, from_, to))
