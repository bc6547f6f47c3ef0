"""The verb `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muonscale.cli.arguments import check_exists, read_path, split_source
from muonscale.errors import ConfigError, command_line


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]", help="A run folder, and a step (default: the newest)."
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(parser=read_path, metavar="FOLDER", help="The folder to write.")
    ],
    dtype: Annotated[
        str, typer.Option(help="Dtype of the parameters: float32, as trained, or bfloat16.")
    ] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a file of weights.")] = "5GB",
    push: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Upload the folder to the Hugging Face Hub: user/model."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that --push creates private.")
    ] = False,
    average: Annotated[
        bool, typer.Option("--average", help="The average of the weights (train.average).")
    ] = False,
) -> None:
    """Write a checkpoint of a run as a Hugging Face model folder.

    The run may still be training. Examples: `muonscale export runs/demo models/demo`;
    `muonscale export runs/demo@300 models/demo-300 --dtype bfloat16`;
    `muonscale export runs/demo models/demo --push user/demo --private`.
    """
    path, step = split_source(source)
    check_exists(path)
    if private and push is None:
        raise ConfigError(f"--private is given without --push NAME, the repository of {folder}")
    if push is not None:
        from muonscale.lab.models.hub import check_upload

        check_upload(push)
    from muonscale.lab.config.sections import read_dtype
    from muonscale.lab.run_folder import RunFolder
    from muonscale.lab.training.export import export as write

    def warn(text: str) -> None:
        typer.echo(text, err=True)

    done = write(
        RunFolder(path),
        step,
        folder,
        dtype=read_dtype(dtype),
        max_shard_size=max_shard_size,
        average=average,
        report=warn,
    )
    again = command_line("generate", folder)
    if push is not None:
        from muonscale.lab.models.hub import upload

        url = upload(folder, push, private=private, message=f"Step {done}, exported by muonscale")
        typer.echo(f"uploaded to {url}")
    typer.echo(f"step {done} of {path} is in {folder}; try: {again}")
