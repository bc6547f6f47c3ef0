"""The command line, as typer describes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
from typer.cli import get_docs_for_click


def commands() -> str:
    """Return every verb with its arguments and options."""
    from muonscale.cli.app import app

    command = typer.main.get_command(app)
    context = command.make_context("muonscale", [], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="muonscale")
    text = text.partition("**Commands**")[2].partition("\n\n")[2]  # the page has a title of its own
    for name, cut, whole in _summaries(command):
        text = text.replace(f"* `{name}`: {cut}\n", f"* `{name}`: {whole}\n")
    text = re.sub(r"^\* `(-h, )?--help`: .*\n", "", text, flags=re.M)
    text = re.sub(r"^\*\*Options\*\*:\n\n(?!\*)", "", text, flags=re.M)
    return re.sub(r"^\* ", "- ", re.sub(r"[ \t]+$", "", text, flags=re.M), flags=re.M)


def _summaries(command: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the summary of every verb as typer cuts it, and whole."""
    for name, verb in getattr(command, "commands", {}).items():
        yield name, verb.get_short_help_str(), verb.get_short_help_str(limit=400)
        yield from _summaries(verb)
