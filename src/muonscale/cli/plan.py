"""The verb `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muonscale.cli.arguments import Json, Model, Overrides, read_path
from muonscale.errors import ConfigError


def plan(
    model: Model,
    overrides: Overrides = None,
    devices: Annotated[
        int | None, typer.Option(help="Number of devices, arranged by parallel.*; at most 4096.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Arrangement of the devices: fsdp=32,tp=2; hsdp=4x8; ddp=8; ep=8."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device: cpu, a100-80gb, h100, h200, b200 or mi300x.")
    ] = "h100",
    mfu: Annotated[
        float, typer.Option(help="Share of the peak FLOPS that the passes reach.")
    ] = 0.4,
    bandwidth: Annotated[
        float | None, typer.Option(help="Bandwidth of a device to other machines, GB per second.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Tokens of a micro-batch on one device.")
    ] = None,
    suggested: Annotated[
        bool,
        typer.Option(
            "--suggest",
            help="Choose layout, micro-batch and activation checkpointing for --devices, and "
            "print the recipe with them.",
        ),
    ] = False,
    as_json: Json = False,
    figure: Annotated[
        Path | None,
        typer.Option(
            parser=read_path, metavar="FILE", help="Draw memory and time to this .png or .svg file."
        ),
    ] = None,
) -> None:
    """Estimate the memory, communication and time of training.

    All numbers are per device, with those of Muon listed separately. Nothing is allocated, and no
    device is needed. Examples: `muonscale plan demo --device cpu`;
    `muonscale plan path/to/config.json train.batch_tokens=4194304 --layout fsdp=64`;
    `muonscale plan my.yaml --devices 8 --suggest > tuned.yaml`.
    """
    from muonscale.lab.estimate.estimate import estimate
    from muonscale.lab.estimate.resolve import PlanRequest
    from muonscale.lab.estimate.text import plan_text, suggestion_text
    from muonscale.lab.files import to_json

    if suggested and figure is not None:
        raise ConfigError(f"--figure {figure} draws one layout; leave out --suggest")
    request = PlanRequest(
        target=model,
        overrides=overrides or [],
        devices=devices,
        layout=layout,
        device=device,
        mfu=mfu,
        bandwidth=None if bandwidth is None else bandwidth * 1e9,
        micro_batch=micro_batch,
    )
    if suggested:
        from muonscale.lab.estimate.suggest import suggest

        facts = suggest(request)
        typer.echo(to_json(facts) if as_json else suggestion_text(facts))
        return
    if figure is not None:
        from muonscale.lab.estimate.figure import check_format, write_figure

        check_format(figure)
        facts = estimate(request)
        write_figure(facts, figure)
    else:
        facts = estimate(request)
    typer.echo(to_json(facts) if as_json else plan_text(facts))
