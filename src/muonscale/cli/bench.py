"""The verb `bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from muonscale.cli.arguments import Json, Model, Overrides


def bench(
    model: Model,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(help="Pairs of steps to time.")] = 5,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="CPU threads (default: run.threads).", show_default=False
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(help="Measure this many of the repeated layers, and extrapolate."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens per training step (default: train.batch_tokens)."),
    ] = None,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Do not measure the forward and backward passes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the time of an optimizer step on this machine.

    The step is measured for every shape of matrix in a model, beside torch's AdamW and torch's
    Muon. Parameters and gradients are random. A model that does not fit into memory is refused
    before anything is allocated. Examples: `muonscale bench demo`; `muonscale bench moonlight-nano
    --tokens 65536`; `muonscale bench path/to/config.json --layers 1 --no-model`.
    """
    from muonscale.lab.bench.model import BenchRequest
    from muonscale.lab.bench.model import bench as measure
    from muonscale.lab.bench.text import bench_text
    from muonscale.lab.files import to_json

    request = BenchRequest(
        target=model,
        overrides=overrides or [],
        rounds=rounds,
        threads=threads,
        layers=layers,
        passes=not no_model,
        tokens=tokens,
    )
    found = measure(request, lambda text: typer.echo(text, err=True))
    typer.echo(to_json(found) if as_json else bench_text(found))
