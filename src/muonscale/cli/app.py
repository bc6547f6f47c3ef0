"""The verbs of the command line. A verb imports the lab when it is called."""

from __future__ import annotations

import shutil
import sys
import textwrap
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from muonscale import __version__
from muonscale.cli import fit, models
from muonscale.cli.arguments import (
    Arguments,
    Json,
    check_exists,
    complete_recipes,
    complete_sections,
    split_arguments,
    split_source,
)
from muonscale.cli.bench import bench
from muonscale.cli.coordcheck import coordcheck
from muonscale.cli.evaluate import evaluate
from muonscale.cli.export import export
from muonscale.cli.generate import generate
from muonscale.cli.import_ import import_
from muonscale.cli.plan import plan
from muonscale.cli.prepare import prepare
from muonscale.cli.report import report
from muonscale.cli.running import DryRun, Extend, Resume, start
from muonscale.cli.study import study
from muonscale.cli.verify import verify
from muonscale.errors import ConfigError, nearest

GROUPS = {
    "Train": ("train", "import", "prepare", "recipes", "config"),
    "Look": ("inspect", "plan", "bench", "verify", "lr", "coordcheck"),
    "Study": ("study", "fit", "report"),
    "Use a model": ("generate", "eval", "export"),
}
"""The commands under each heading of `--help`, in order; `--help` lists no others."""


class _Verbs(TyperGroup):
    """The verbs in groups, each with its whole summary."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the verbs in the order of `GROUPS`."""
        return [name for names in GROUPS.values() for name in names]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for every group."""
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name, self.commands[name].get_short_help_str(400)) for name in names],
                    col_max=12,
                )


app = typer.Typer(
    name="muonscale",
    cls=_Verbs,
    help="Train language models with the Muon family of optimizers.",
    epilog="Try `muonscale train`, or `muonscale train data.path=my.txt run.path=runs/mine`. "
    "`muonscale VERB --help` has examples.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"muonscale {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Train language models with the Muon family of optimizers."""


@app.command()
def train(
    arguments: Arguments = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    extend: Extend = False,
    as_json: Json = False,
) -> None:
    """Train a model, evaluate it and write a run folder.

    Examples: `muonscale train`; `muonscale train data.path=my.txt run.path=runs/mine`;
    `muonscale train runs/mine --resume`;
    `muonscale train runs/mine --extend train.tokens=4M run.path=runs/longer`. On several processes:
    `torchrun --nproc-per-node 4 -m muonscale train parallel.data=fsdp`.
    """
    from muonscale.lab.config.load import load_config

    recipe, overrides = split_arguments(arguments or [])
    if not extend:
        config, extension = load_config(recipe, overrides), None
    else:
        source, step = split_source(recipe)
        check_exists(source)
        from muonscale.lab.training.extend import plan_extension

        extension = plan_extension(source, step, overrides)
        config = extension.config
    start(config, dry_run=dry_run, resume=resume, as_json=as_json, extension=extension)


app.command()(generate)
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
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A recipe to print as YAML.",
            autocompletion=complete_recipes,
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the recipes of `train` and of `study`, or print one.

    A recipe that is printed into a file can be changed and used. Example:
    `muonscale recipes demo > my.yaml`.
    """
    from muonscale.lab.config.load import recipe_names, recipe_summary
    from muonscale.lab.config.read import RECIPES, shipped_text
    from muonscale.lab.studies.kinds import STUDIES, study_names, study_summary

    if name is not None:
        if name not in (*recipe_names(), *study_names()):
            hint = nearest(name, [*recipe_names(), *study_names()])
            raise ConfigError(f"there is no recipe {name}; {hint}")
        typer.echo(shipped_text(RECIPES if name in recipe_names() else STUDIES, name), nl=False)
        return
    runs = {name: recipe_summary(name) for name in recipe_names()}
    studies = {name: study_summary(name) for name in study_names()}
    width = max(map(len, [*runs, *studies]))
    for title, each in (("muonscale train NAME", runs), ("muonscale study run NAME", studies)):
        typer.echo(title)
        for name, summary in each.items():
            typer.echo(_hanging(f"  {name:{width}}  ", summary))


def _hanging(begin: str, text: str) -> str:
    """Return text after `begin`; on a terminal its lines are wrapped between words."""
    if not sys.stdout.isatty():
        return begin + text
    columns = shutil.get_terminal_size().columns
    return textwrap.fill(
        text, columns, initial_indent=begin, subsequent_indent=" " * min(len(begin), columns // 2)
    )


@app.command()
def config(
    word: Annotated[
        str | None,
        typer.Argument(
            metavar="[SECTION|KEY]",
            help="A section, a key, or a part of a key (default: all).",
            autocompletion=complete_sections,
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the keys of a run, each with its default and its meaning.

    Examples: `muonscale config`; `muonscale config optimizer`; `muonscale config train.tokens`;
    `muonscale config warmup`.
    """
    from muonscale.lab.config.keys import describe_keys, find_keys
    from muonscale.lab.files import to_json

    if as_json:
        typer.echo(to_json([asdict(key) for keys in find_keys(word).values() for key in keys]))
    else:
        typer.echo(describe_keys(word, width=min(100, shutil.get_terminal_size().columns)))
