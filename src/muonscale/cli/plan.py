"""The verb `plan`: what training would cost, before it is begun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muonscale.cli.arguments import Json, Model, Overrides


def plan(
    model: Model,
    overrides: Overrides = None,
    devices: Annotated[
        int | None, typer.Option(help="Number of devices, arranged as parallel.* says; up to 4096.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="Arrangement instead: fsdp=32,tp=2; hsdp=4x8; ddp=8; ep=8.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, a100-80gb, h100, h200, b200 or mi300x.")
    ] = "h100",
    mfu: Annotated[float, typer.Option(help="Part of the peak that the passes reach.")] = 0.4,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB per second of a device to other machines.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Tokens a device takes through the model at a time.")
    ] = None,
    as_json: Json = False,
    figure: Annotated[
        Path | None, typer.Option(help="Draw memory and time into this .png or .svg file.")
    ] = None,
) -> None:
    """Show what training would need: memory, bytes and time per device, and what Muon adds.

    Nothing is allocated and no device is needed. Examples: `muonscale plan demo --device cpu`;
    `muonscale plan path/to/config.json train.batch_tokens=4194304 --layout fsdp=64`.
    """
    from muonscale.lab.estimate.estimate import estimate
    from muonscale.lab.estimate.formats import check_format
    from muonscale.lab.estimate.resolve import PlanRequest
    from muonscale.lab.estimate.text import table

    asked = PlanRequest(
        target=model,
        overrides=overrides or [],
        devices=devices,
        layout=layout,
        device=device,
        mfu=mfu,
        bandwidth=None if bandwidth is None else bandwidth * 1e9,
        micro_batch=micro_batch,
    )
    if figure is not None:
        check_format(figure)
    found = estimate(asked)
    if figure is not None:
        from muonscale.lab.estimate.figure import draw

        draw(found.facts, figure)
    typer.echo(found.json() if as_json else table(found.facts))
