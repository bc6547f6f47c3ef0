"""What several verbs take: a recipe and its overrides, a model, JSON instead of text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muonscale.errors import ConfigError

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [section.key=value ...]",
        help="A recipe name, a YAML file or a run folder (default: demo), then overrides.",
        show_default=False,
    ),
]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A preset, a recipe, a run folder, or a Hugging Face config.json or its folder.",
    ),
]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value ...]", show_default=False),
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def split_arguments(arguments: list[str]) -> tuple[str, list[str]]:
    """Tell the recipe from the overrides among the words after `train`.

    Raises:
        ConfigError: if there are two recipes.
    """
    overrides = [word for word in arguments if "=" in word]
    names = [word for word in arguments if "=" not in word]
    if len(names) > 1:
        raise ConfigError(
            f"give one recipe at a time, got {' and '.join(names)}; "
            "an override has the form section.key=value"
        )
    return names[0] if names else "demo", overrides


def split_source(text: str) -> tuple[Path, int | None]:
    """Tell the step from the run folder, whose own name may hold an @.

    Raises:
        ConfigError: if what stands after the @ is not a step.
    """
    run, sign, step = text.rpartition("@")
    if not sign or Path(text).exists():
        return Path(text), None
    if not step.isascii() or not step.isdigit():
        raise ConfigError(
            f"{text}: after the @ stands the step of a checkpoint, a whole number, not {step!r}"
            "; give it as RUN@STEP"
        )
    return Path(run), int(step)
