"""The verb `bench`: how long a step of the optimizer takes, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from muonscale.cli.arguments import Json, Model, Overrides


def bench(
    model: Model,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(help="Pairs of steps to time.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads; run.threads when not given.")
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(help="Number of repeated layers to measure; the rest is extrapolated."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a training step; train.batch_tokens when not given."),
    ] = None,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Leave out forward and backward passes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a step of the optimizer for a model, shape by shape, beside torch's AdamW and Muon.

    Parameters and gradients are random. A model that does not fit into memory is refused before
    anything is allocated. Examples: `muonscale bench demo`; `muonscale bench moonlight-nano --tokens 65536`;
    `muonscale bench path/to/config.json --layers 1 --no-model`.
    """
    from muonscale.lab.bench.model import BenchRequest, bench_json
    from muonscale.lab.bench.model import bench as measure
    from muonscale.lab.bench.text import bench_text

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
    typer.echo(bench_json(found) if as_json else bench_text(found))
