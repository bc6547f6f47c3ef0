"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muonscale.errors import CheckpointError, ConfigError


def complete_runs(start: str) -> list[str]:
    """Return the recipes of runs that begin with `start`, for the completion of a shell."""
    from muonscale.lab.config.load import recipe_names

    return [name for name in recipe_names() if name.startswith(start)]


def complete_studies(start: str) -> list[str]:
    """Return the recipes of studies that begin with `start`."""
    from muonscale.lab.studies.kinds import study_names

    return [name for name in study_names() if name.startswith(start)]


def complete_recipes(start: str) -> list[str]:
    """Return the recipes of runs and of studies that begin with `start`."""
    return [*complete_runs(start), *complete_studies(start)]


def complete_sections(start: str) -> list[str]:
    """Return the sections and keys of a run that begin with `start`."""
    from muonscale.lab.config.load import KEYS, Config

    keys = [f"{section}.{key}" for key, sections in KEYS.items() for section in sections]
    return [name for name in (*Config.model_fields, *sorted(keys)) if name.startswith(start)]


def complete_arguments(start: str) -> list[str]:
    """Return the recipes, and the keys with their `=`, that begin with `start`."""
    keys = [f"{name}=" for name in complete_sections(start) if "." in name]
    return [*complete_runs(start), *keys]


Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [section.key=value ...]",
        help="A recipe, a YAML file or a run folder (default: demo, of import: finetune), then "
        "overrides of its keys, "
        "which `muonscale config` lists.",
        autocompletion=complete_arguments,
        show_default=False,
    ),
]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A preset, a recipe, a run folder, or a Hugging Face config.json or its folder.",
        autocompletion=complete_runs,
    ),
]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.key=value ...]",
        help="Overrides of keys, which `muonscale config` lists.",
        autocompletion=complete_arguments,
        show_default=False,
    ),
]

Tokens = Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature; 0 always picks the most likely token.")
]
TopK = Annotated[int, typer.Option(min=1, help="Sample from this many of the most likely tokens.")]
TopP = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Sample from the most likely tokens of this total probability."
    ),
]
SampleSeed = Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first sample.")]


def read_path(text: str) -> Path:
    """Return the path that an option or an argument names.

    Raises:
        typer.BadParameter: for a URL; of other errors typer would print the text alone.
    """
    from muonscale.lab.files import NO_URL, is_url

    if is_url(text):
        raise typer.BadParameter(f"{text}: {NO_URL}")
    return Path(text)


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def split_arguments(arguments: list[str], default: str = "demo") -> tuple[str, list[str]]:
    """Split the words after `train` into the recipe, `default` if there is none, and the overrides.

    Raises:
        ConfigError: if there are two recipes.
    """
    overrides = [word for word in arguments if "=" in word]
    names = [word for word in arguments if "=" not in word]
    if len(names) > 1:
        raise ConfigError(
            f"give one recipe, not {len(names)}: {' and '.join(names)}; an override has the form "
            "section.key=value"
        )
    return names[0] if names else default, overrides


def check_exists(folder: Path) -> None:
    """Refuse a folder that does not exist, before torch is imported, which takes seconds.

    Raises:
        CheckpointError: if there is nothing at this path.
    """
    if not folder.exists():
        raise CheckpointError(
            f"{folder} is neither a run folder nor a Hugging Face model folder: it does not exist"
        )


def split_source(text: str) -> tuple[Path, int | None]:
    """Split RUN@STEP into the run folder, whose name may contain an @, and the step.

    Raises:
        ConfigError: if the part after the @ is not a step, or for a URL.
    """
    from muonscale.lab.files import check_local

    check_local(text, "run")
    run, sign, step = text.rpartition("@")
    if not sign or Path(text).exists():
        return Path(text), None
    if not step.isascii() or not step.isdigit():
        raise ConfigError(
            f"{text}: {step!r} is not the step of a checkpoint; the form is RUN@STEP, with a whole "
            "number"
        )
    return Path(run), int(step)
