"""A recipe and its overrides, as the words after a verb."""

from __future__ import annotations

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


def split_arguments(arguments: list[str]) -> tuple[str, list[str]]:
    """Tell the recipe from the overrides among the words after `train`.

    Raises:
        ConfigError: if there are two recipes.
    """
    overrides = [word for word in arguments if "=" in word]
    names = [word for word in arguments if "=" not in word]
    if len(names) > 1:
        raise ConfigError(
            f"one recipe at a time, got {' and '.join(names)}; "
            "an override has the form section.key=value"
        )
    return names[0] if names else "demo", overrides
