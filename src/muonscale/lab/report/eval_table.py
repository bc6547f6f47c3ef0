"""Measurements of a checkpoint as the rows of a table, for the console and for reports."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

HEAD = ("measured on", "measure", "value", "standard error", "of")

Row = tuple[str, str, str, str, str]

TEXT = {
    "loss": ("nats per token", ".4f"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "unigram_loss": ("unigram baseline, nats per token", ".4f"),
    "bigram_loss": ("bigram baseline, nats per token", ".4f"),
}
"""Figures of a text, what they are called, and how they are written."""


def rows_of(measured: dict[str, Any]) -> list[Row]:
    """Return the rows of a checkpoint of eval/result.json; samples are not in them."""
    rows = [row for text in measured.get("texts", ()) for row in _text_rows(text)]
    return rows + [row for task in measured.get("tasks", ()) for row in _task_rows(task)]


def _text_rows(text: dict[str, Any]) -> Iterator[Row]:
    corpora = text.get("corpora")
    corpora = corpora if isinstance(corpora, dict) else {}
    title = "mean of the mixture" if len(corpora) > 1 else ", ".join(corpora)
    yield from _figures(title, text)
    for name, figures in corpora.items() if len(corpora) > 1 else ():
        yield from _figures(name, {**figures, "split": text.get("split")})


def _figures(title: str, figures: dict[str, Any]) -> Iterator[Row]:
    split = "held out" if figures.get("split") == "held_out" else "all of it"
    size = f"{_number(figures.get('tokens'), ',d')} tokens"
    for key, (name, how) in TEXT.items():
        if key in figures:
            yield f"{title} ({split})", name, _number(figures[key], how), "", size


def _task_rows(task: dict[str, Any]) -> Iterator[Row]:
    title = f"{task.get('task')}, {_shots(task.get('shots'))}"
    documents = task.get("documents")
    size = f"{_number(documents, ',d')} documents"
    if task.get("limit") is not None:
        size += f" (at most {task['limit']} of a task)"
    values = task.get("values")
    for metric, value in (values if isinstance(values, dict) else {}).items():
        shown = (_number(value.get("value"), ".4f"), _number(value.get("stderr"), ".4f"))
        yield title, metric, *shown, size
    if isinstance(paper := task.get("paper"), dict):
        name = f"{paper.get('benchmark')} of the paper, other prompts"
        yield title, name, f"{paper.get('value')} %", "", str(task.get("suite"))


def notes_of(measured: dict[str, Any]) -> list[str]:
    """Return sentences on what the values do not say: cut prompts, benchmarks that were left out."""
    notes = [
        f"task {task['task']}: {task['truncations']} prompts or batches of them were longer than the "
        "model's positions and lost their beginning"
        for task in measured.get("tasks", ())
        if task.get("truncations")
    ]
    for suite in measured.get("suites", ()):
        notes += [f"left out: {name}, {why}" for name, why in suite.get("left_out", {}).items()]
    return notes


def _shots(shots: object) -> str:
    return f"{shots} shot{'' if shots == 1 else 's'}" if isinstance(shots, int) else "own shots"


def _number(value: object, how: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return f"{round(value) if how.endswith('d') else value:{how}}"
