"""The verbs of the command line. A verb imports the lab when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muonscale.cli import fit, models
from muonscale.cli.arguments import (
    Arguments,
    SampleSeed,
    Temperature,
    Tokens,
    TopK,
    split_arguments,
)
from muonscale.cli.bench import bench
from muonscale.cli.coordcheck import coordcheck
from muonscale.cli.evaluate import evaluate
from muonscale.cli.export import export
from muonscale.cli.import_ import import_
from muonscale.cli.plan import plan
from muonscale.cli.prepare import prepare
from muonscale.cli.report import report
from muonscale.cli.running import DryRun, Resume, start
from muonscale.cli.study import study
from muonscale.cli.verify import verify
from muonscale.errors import ConfigError, command_line

app = typer.Typer(
    name="muonscale",
    help="Train language models with the Muon family of optimizers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _options() -> None:
    """Train language models with the Muon family of optimizers."""


@app.command()
def train(arguments: Arguments = None, dry_run: DryRun = False, resume: Resume = False) -> None:
    """Train a model, evaluate it and write a run folder.

    Examples: `muonscale train`; `muonscale train data.path=my.txt run.path=runs/mine`;
    `muonscale train runs/mine --resume`. On several processes:
    `torchrun --nproc-per-node 4 -m muonscale train parallel.data=fsdp`.
    """
    from muonscale.lab.config.load import load_config

    recipe, overrides = split_arguments(arguments or [])
    start(load_config(recipe, overrides), dry_run=dry_run, resume=resume)


@app.command()
def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or a Hugging Face model folder.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")] = "",
    tokens: Tokens = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    seed: SampleSeed = 0,
) -> None:
    """Generate text with a trained model."""
    from muonscale.lab.models.convert import load_hf
    from muonscale.lab.models.generate import generate_text
    from muonscale.lab.run_folder import RunFolder
    from muonscale.lab.targets import is_hugging_face

    run = RunFolder(folder)
    is_run = run.exists and not is_hugging_face(folder)
    if is_run and not run.model.is_dir():
        raise ConfigError(
            f"run {folder} is not finished and has no model yet; finish it with: "
            f"{command_line('train', folder, '--resume')}\n"
            f"or export its newest checkpoint with: {command_line('export', folder, 'FOLDER')}"
        )
    model, tokenizer = load_hf(run.model if is_run else folder)
    typer.echo(
        generate_text(
            model, tokenizer, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed
        )
    )


app.command()(prepare)
app.command("eval")(evaluate)
app.command()(export)
app.command("import")(import_)
app.command()(models.inspect)
app.command()(models.lr)
app.command()(plan)
app.command()(bench)
app.command()(report)
app.command()(verify)
app.add_typer(study)
app.add_typer(fit.app, name="fit")
app.command()(coordcheck)


@app.command()
def recipes() -> None:
    """List the recipes of `train` and of `study`."""
    from muonscale.lab.config.load import recipe_names, recipe_summary
    from muonscale.lab.studies.kinds import study_names, study_summary

    runs = {name: recipe_summary(name) for name in recipe_names()}
    studies = {name: study_summary(name) for name in study_names()}
    width = max(map(len, [*runs, *studies]))
    for title, each in (("muonscale train NAME", runs), ("muonscale study run NAME", studies)):
        typer.echo(title)
        for name, summary in each.items():
            typer.echo(f"  {name:{width}}  {summary}")
