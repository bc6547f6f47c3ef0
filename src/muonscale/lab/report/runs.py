"""The page of one run, or of several runs that are compared."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from muonscale.errors import command_line
from muonscale.lab.files import read_text
from muonscale.lab.report.measure_charts import Measure, chart_of
from muonscale.lab.report.page import Block, Command, Page, PageSection, Text, Tiles, Verbatim
from muonscale.lab.report.run_data import RunData, is_finite, read_run
from muonscale.lab.report.run_measures import (
    ATTENTION,
    OPTIMIZER,
    ROUTING,
    SPEED,
    have_different_tokenizers,
    loss_views,
    spectra,
    spike_steps,
)
from muonscale.lab.report.run_tables import (
    comparison_table,
    data_table,
    differences_table,
    evaluation_table,
    reproduce_command,
    result_table,
    settings_table,
    versions_table,
)
from muonscale.lab.report.tiles import comparison_tiles, result_tiles
from muonscale.lab.run_folder import started_with
from muonscale.optim.options import OPTIONS_OF

LISTED = 20
"""The most spikes that are listed."""

NORMS = {"grad_norm": "gradients", "update_rms": "Muon updates"}
"""Norms of which spikes are counted, with their titles."""


def runs_page(paths: Sequence[Path]) -> Page:
    """Return the page of run folders: all about one, or a comparison of several.

    The page shows whatever can be read of unfinished and damaged folders, and says what is missing.
    """
    paths = list(dict.fromkeys(path.resolve() for path in paths))
    runs = [read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]
    several = len(runs) > 1
    sections = [
        ("Results", _results(runs)),
        ("Optimizer", [*_charts(OPTIMIZER, runs), *(_spikes(run, several) for run in runs)]),
        ("Speed", _charts(SPEED, runs)),
        ("Routing of experts", _charts(ROUTING, runs)),
        ("Attention", _charts(ATTENTION, runs)),
        ("Weights and updates", _charts(spectra(runs), runs)),
        ("Configuration", _configuration(runs)),
        ("Commands", [block for run in runs for block in _commands(run, several)]),
        ("Data", [data_table(runs)]),
        ("Samples", _samples(runs)),
        ("Versions", [versions_table(runs)]),
    ]
    sentences = [f"{run.label}: {_sentence(run)}" if several else _sentence(run) for run in runs]
    return Page(
        title=f"Comparison of {len(runs)} runs" if several else f"Run {runs[0].label}",
        summary="\n\n".join(sentences),
        sections=tuple(
            PageSection(title=name, blocks=known)
            for name, blocks in sections
            if (known := tuple(block for block in blocks if block is not None))
        ),
    )


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return names for folders: the shortest ends of their paths that are all different."""
    parts = [path.parts for path in paths]
    choices = (["/".join(part[-n:]) for part in parts] for n in range(1, max(map(len, parts)) + 1))
    return next(labels for labels in choices if len(set(labels)) == len(labels))


def _sentence(run: RunData) -> str:
    """Describe a run and its result, as far as they are known."""
    model = next(
        filter(None, (run.setting("model", k) for k in ("preset", "config", "weights"))), None
    )
    rule, lr = run.setting("optimizer", "rule"), run.setting("optimizer", "lr")
    title = OPTIONS_OF[rule].title if rule in OPTIONS_OF else "an unknown optimizer"
    parts = [f"{model or 'A model'} trained with {title}"]
    if is_finite(lr):
        parts[0] += f" at a learning rate of {lr:g}"
    loss, bigram = run.result.get("validation_loss"), run.result.get("bigram_loss")
    if is_finite(loss):
        parts.append(f"validation loss {loss:.3f} nats per token")
        if is_finite(bigram):
            side = "below" if loss < bigram else "above"
            parts[1] += f", {abs(loss - bigram):.3f} {side} a bigram model"
    return ": ".join(parts) + "."


def _results(runs: Sequence[RunData]) -> list[Block | None]:
    several = len(runs) > 1
    notes = [
        Text(f"{run.label}: {note}" if several else note) for run in runs for note in run.notes
    ]
    notes += [Text(note) for note in _differences_of_text(runs)]
    table = comparison_table(runs) if several else result_table(runs[0])
    tiles = comparison_tiles(runs) if several else result_tiles(runs[0])
    return [
        *notes,
        Tiles(tiles) if tiles else None,
        loss_views(runs),
        table if table.rows else None,
        evaluation_table(runs),
    ]


def _differences_of_text(runs: Sequence[RunData]) -> list[str]:
    """Return sentences about why losses of runs cannot be compared as they are."""
    notes = []
    if have_different_tokenizers(runs):
        notes.append(
            "The runs have different tokenizers: compare bits per byte, not losses per token."
        )
    keys = ("source", "path", "mixture", "field", "validation")
    texts = [{key: run.setting("data", key) for key in keys} for run in runs if run.config]
    if any(text != texts[0] for text in texts):
        notes.append("The runs have different data: their losses are of different texts.")
    return notes


def _commands(run: RunData, several: bool) -> list[Block]:
    blocks: list[Block] = [Text(f"{run.label}:")] if several else []
    if (words := started_with(run.env)) is not None:
        blocks += [] if several else [Text("The run was last started with:")]
        blocks.append(Command(shlex.join(words)))
    if run.resolved is not None and not several:
        again = reproduce_command(run.resolved, f"{run.path}-again")
        blocks += [Text("The same run from a recipe, into a new folder:"), Command(again)]
    if not run.finished:
        blocks += [Text("To continue it:"), Command(command_line("train", run.path, "--resume"))]
    elif not several:
        generate = Command(command_line("generate", run.path, "def "))
        blocks += [Text("To generate text with its model:"), generate]
    return blocks


def _configuration(runs: Sequence[RunData]) -> list[Block]:
    known = [run for run in runs if run.config]
    if len(runs) == 1:
        blocks: list[Block] = [settings_table(run) for run in known]
    elif len(known) > 1 and (differences := differences_table(known)) is not None:
        blocks = [Text("The runs differ in:"), differences]
    else:
        blocks = [Text("The runs have the same configuration apart from their folders.")]
    for run in known:
        caption = f"config.json of {run.label}" if len(runs) > 1 else "config.json"
        blocks.append(Verbatim(text=json.dumps(run.config, indent=2), caption=caption, folded=True))
    return blocks


def _charts(measures: Iterable[Measure], runs: Sequence[RunData]) -> list[Block | None]:
    return [chart_of(measure, runs) for measure in measures]


def _spikes(run: RunData, several: bool) -> Text | None:
    """Return which steps were spikes and how many were skipped; None if that was not recorded."""
    train = run.of_kind("train")
    if not any("spikes" in record for record in train):
        return None
    parts = []
    for norm, what in NORMS.items():
        steps = spike_steps(run, norm)
        listed = ", ".join(f"{step:,}" for step in steps[:LISTED])
        more = f" and {len(steps) - LISTED} more" if len(steps) > LISTED else ""
        parts.append(f"Spikes of {what}: " + (f"steps {listed}{more}." if steps else "none."))
    skipped = train[-1].get("skipped_steps")
    if is_finite(skipped):
        parts.append(f"Steps skipped for gradients that are not finite: {skipped}.")
    return Text((f"{run.label}: " if several else "") + " ".join(parts))


def _samples(runs: Sequence[RunData]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        text = run.result.get("sample")
        if not text:
            try:
                text = read_text(run.path / "sample.txt", errors="replace")
            except OSError:
                continue
        if text:
            caption = run.label if len(runs) > 1 else "Written by the model after training."
            blocks.append(Verbatim(text=str(text), caption=caption))
    return blocks
