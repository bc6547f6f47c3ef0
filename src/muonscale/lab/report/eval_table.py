"""Measurements of a checkpoint as the rows of a table, for the console and for reports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from muonscale.lab.report.run_data import is_finite

HEAD = ("measured on", "measure", "value", "standard error", "of")

EvalRow = tuple[str, str, str, str, str]

MEASURES = {
    "loss": ("nats per token", ".4f"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "unigram_loss": ("unigram baseline, nats per token", ".4f"),
    "bigram_loss": ("bigram baseline, nats per token", ".4f"),
}
"""Measures of a text, with their titles and formats."""


def rows_of(measured: dict[str, Any]) -> list[EvalRow]:
    """Return the rows of a checkpoint in eval/result.json; samples have none."""
    rows = [row for text in measured.get("texts", ()) for row in _text_rows(text)]
    return rows + [row for task in measured.get("tasks", ()) for row in _task_rows(task)]


def _text_rows(text: dict[str, Any]) -> Iterator[EvalRow]:
    corpora = text.get("corpora")
    corpora = corpora if isinstance(corpora, dict) else {}
    texts = [("mean of the mixture" if len(corpora) > 1 else ", ".join(corpora), text)]
    if len(corpora) > 1:
        texts += [(name, {**own, "split": text.get("split")}) for name, own in corpora.items()]
    for title, values in texts:
        split = "validation" if values.get("split") == "validation" else "all of it"
        size = f"{format_cell(values.get('tokens'), ',d')} tokens"
        for key, (name, how) in MEASURES.items():
            if key in values:
                yield f"{title} ({split})", name, format_cell(values[key], how), "", size


def _task_rows(task: dict[str, Any]) -> Iterator[EvalRow]:
    shots = task.get("shots")
    number = f"{shots} shot{'' if shots == 1 else 's'}" if isinstance(shots, int) else "own shots"
    title = f"{task.get('task')}, {number}"
    size = f"{format_cell(task.get('documents'), ',d')} documents"
    if task.get("limit") is not None:
        size += f" (at most {task['limit']} of a task)"
    values = task.get("values")
    for metric, value in (values if isinstance(values, dict) else {}).items():
        numbers = [format_cell(value.get(key), ".4f") for key in ("value", "stderr")]
        yield title, metric, numbers[0], numbers[1], size
    if isinstance(paper := task.get("paper"), dict):
        name = f"{paper.get('benchmark')} of the paper, other prompts"
        yield title, name, f"{paper.get('value')} %", "", str(task.get("suite"))


def notes_of(measured: dict[str, Any]) -> list[str]:
    """Return sentences about prompts that were cut and benchmarks that were left out."""
    notes = [
        f"task {task['task']}: {task['truncations']} prompts or batches of them were longer "
        "than the model's positions and lost their beginning"
        for task in measured.get("tasks", ())
        if task.get("truncations")
    ]
    for suite in measured.get("suites", ()):
        notes += [f"left out: {name}, {why}" for name, why in suite.get("left_out", {}).items()]
    return notes


def format_cell(value: object, how: str) -> str:
    """Return a number in a format, rounded if that is `d`; nothing if it is not a number."""
    if not is_finite(value):
        return ""
    return f"{round(value) if how.endswith('d') else value:{how}}"
