"""The verb `generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muonscale.cli.arguments import (
    SampleSeed,
    Temperature,
    Tokens,
    TopK,
    TopP,
    check_exists,
    split_source,
)
from muonscale.errors import ConfigError, command_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]|FOLDER",
            help="A finished run, a step of a run, or a Hugging Face model folder.",
        ),
    ],
    prompt: Annotated[
        str, typer.Argument(help="The text to continue; - reads it from standard input.")
    ] = "",
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Answer the prompt as a message, by the chat template."),
    ] = False,
    tokens: Tokens = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    seed: SampleSeed = 0,
) -> None:
    """Generate text with a trained model, and print it as it is written.

    Examples: `muonscale generate runs/demo "def "`; `muonscale generate runs/demo@300 - < my.txt`;
    `muonscale generate runs/chat "What is a matrix?" --chat --top-p 0.9`.
    """
    path, step = split_source(source)
    check_exists(path)
    text = sys.stdin.read() if prompt == "-" else prompt
    from muonscale.lab.models.generate import generate_text, message_prompt

    model, tokenizer = _load(path, step)
    pieces = 0

    def show(piece: str) -> None:
        nonlocal pieces
        pieces += 1
        if pieces > 1 or not chat:  # the first piece is the prompt
            typer.echo(piece, nl=False)

    generate_text(
        model,
        tokenizer,
        message_prompt(tokenizer, text) if chat else text,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        show=show,
    )
    typer.echo()


def _load(path: Path, step: int | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer of a finished run, of a step, or of a model folder."""
    from muonscale.lab.evaluation.target import run_target
    from muonscale.lab.models.convert import load_hf
    from muonscale.lab.run_folder import RunFolder
    from muonscale.lab.targets import is_hugging_face

    run = RunFolder(path)
    if not run.exists or is_hugging_face(path):
        if step is not None:
            raise ConfigError(f"{path} is not a run, and has no steps; leave out @{step}")
        return load_hf(path)
    if step is not None:
        target = run_target(run, step, lambda text: typer.echo(text, err=True))
        return target.model, target.tokenizer
    if not run.model.is_dir():
        raise ConfigError(
            f"run {path} is not finished and has no model yet; finish it with: "
            f"{command_line('train', path, '--resume')}\n"
            f"or export its newest checkpoint with: {command_line('export', path, 'FOLDER')}"
        )
    return load_hf(run.model)
