"""The verb `import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from muonscale.cli import is_first_process
from muonscale.cli.arguments import Arguments, Json, read_path, split_arguments
from muonscale.cli.running import DryRun, Resume, start
from muonscale.optim.options import OPTIONS_OF


def import_(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|NAME",
            help="A Hugging Face checkpoint folder, or the name of a model on the Hub.",
        ),
    ],
    arguments: Arguments = None,
    state: Annotated[
        Path | None,
        typer.Option(
            parser=read_path,
            metavar="FILE",
            help="Optimizer state to start from (optimizer.state).",
        ),
    ] = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a model from a Hugging Face checkpoint.

    This is `train` with model.weights and data.tokenizer set to the checkpoint; without a recipe,
    with the learning rate and the schedule of `muonscale recipes finetune`. Resume such a run
    with `muonscale train RUN --resume`. Examples: `muonscale import runs/demo/model
    data.path=my.txt run.path=runs/more`; `muonscale import org/model my.yaml optimizer.rule=adamw`.
    """
    from muonscale.lab.config.load import load_config
    from muonscale.lab.models.hub import (
        MUON_GAINS_NOTHING,
        checkpoint_folder,
        fitting_length,
        trained_with_muon,
    )

    recipe, overrides = split_arguments(arguments or [], default="finetune")
    folder = checkpoint_folder(checkpoint)
    if recipe == "finetune":
        overrides = [f"data.sequence_length={fitting_length(folder)}", *overrides]
    given = {"model.weights": folder, "data.tokenizer": folder}
    if state is not None:
        given["optimizer.state"] = state
    ours = [f"{key}={json.dumps(str(path))}" for key, path in given.items()]
    config = load_config(recipe, [*ours, *overrides])
    given_lr = any(word.startswith("optimizer.lr=") for word in overrides)
    if recipe == "demo" and not given_lr and is_first_process():
        typer.echo(
            f"warning: optimizer.lr={config.optimizer.lr} is that of the recipe demo, which trains "
            "a small model from the start; give a recipe or optimizer.lr",
            err=True,
        )
    if (
        OPTIONS_OF[config.optimizer.rule].on_matrices
        and not trained_with_muon(folder)
        and is_first_process()
    ):
        typer.echo(f"warning: {MUON_GAINS_NOTHING}", err=True)
    start(config, dry_run=dry_run, resume=resume, as_json=as_json)
