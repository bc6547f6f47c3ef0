"""The page of a run folder, or of several that are compared."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from muonscale.lab.report.measures import Measure, chart_of
from muonscale.lab.report.page import (
    Block,
    Command,
    Page,
    Section,
    Table,
    Text,
    Verbatim,
)
from muonscale.lab.report.run_data import RunData, read_run
from muonscale.lab.report.run_measures import (
    ATTENTION,
    OPTIMIZER,
    ROUTING,
    SPEED,
    finite,
    loss_charts,
    spectra,
    spike_steps,
)
from muonscale.lab.report.run_tables import (
    comparison_table,
    data_table,
    differences_table,
    evaluation_table,
    result_table,
    same_again,
    settings_table,
    started_with,
    versions_table,
)
from muonscale.optim.options import OPTIONS_OF

LISTED = 20
"""Spikes that are listed at most."""

LENGTHS = {"grad_norm": "gradients", "update_rms": "Muon updates"}
"""What spikes are counted of."""


def runs_page(paths: Sequence[Path]) -> Page:
    """Return the page of run folders: all about one, or several beside each other.

    Folders may be unfinished or damaged: what is there is shown, and sentences say what is not.
    """
    paths = list(dict.fromkeys(path.resolve() for path in paths))
    runs = [read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]
    (title, summary) = _heading(runs)
    found = [
        ("Results", _results(runs)),
        ("Commands", [block for run in runs for block in _commands(run, len(runs) > 1)]),
        ("Configuration", _configuration(runs)),
        ("Loss", _losses(runs)),
        ("Optimizer", [*_charts(OPTIMIZER, runs), *_spikes(runs)]),
        ("Speed", _charts(SPEED, runs)),
        ("Routing of experts", _charts(ROUTING, runs)),
        ("Attention", _charts(ATTENTION, runs)),
        ("Weights and updates", _charts(spectra(runs), runs)),
        ("Data", _tables(data_table(runs))),
        ("Samples", _samples(runs)),
        ("Versions", _tables(versions_table(runs))),
    ]
    sections = tuple(Section(title=name, blocks=tuple(blocks)) for name, blocks in found if blocks)
    return Page(title=title, summary=summary, sections=sections)


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the names of different folders, with as much of their paths as tells them apart."""
    parts = [path.parts for path in paths]
    choices = (["/".join(part[-n:]) for part in parts] for n in range(1, max(map(len, parts)) + 1))
    return next(labels for labels in choices if len(set(labels)) == len(labels))


def _heading(runs: Sequence[RunData]) -> tuple[str, str]:
    if len(runs) == 1:
        return f"Run {runs[0].label}", _sentence(runs[0])
    return f"{len(runs)} runs", "\n\n".join(f"{run.label}: {_sentence(run)}" for run in runs)


def _sentence(run: RunData) -> str:
    """Return what a run is and came to, as far as it is known."""
    model = next(
        filter(None, (run.setting("model", k) for k in ("preset", "config", "weights"))), None
    )
    rule, lr = run.setting("optimizer", "rule"), run.setting("optimizer", "lr")
    title = OPTIONS_OF[rule].title if rule in OPTIONS_OF else "an unknown optimizer"
    parts = [f"{model or 'A model'} trained with {title}"]
    if finite(lr):
        parts[0] += f" at a learning rate of {lr:g}"
    loss, bigram = run.result.get("held_out_loss"), run.result.get("bigram_loss")
    if finite(loss):
        parts.append(f"held-out loss {loss:.3f} nats per token")
        if finite(bigram):
            side = "below" if loss < bigram else "above"
            parts[1] += f", {abs(loss - bigram):.3f} {side} a bigram model"
    return ": ".join(parts) + "."


def _results(runs: Sequence[RunData]) -> list[Block]:
    several = len(runs) > 1
    notes = [
        Text(f"{run.label}: {note}" if several else note) for run in runs for note in run.notes
    ]
    table = comparison_table(runs) if several else result_table(runs[0])
    return [*notes, *([table] if table.rows else []), *_tables(evaluation_table(runs))]


def _commands(run: RunData, several: bool) -> list[Block]:
    path = shlex.quote(str(run.path))
    blocks: list[Block] = [Text(f"{run.label}:")] if several else []
    started = started_with(run)
    if started is not None:
        blocks += [] if several else [Text("The run was last started with:")]
        blocks.append(Command(started))
    if run.resolved is not None and not several:
        again = same_again(run.resolved, f"{run.path}-again")
        blocks += [Text("The same run from a recipe, into a new folder:"), Command(again)]
    if not run.finished:
        blocks += [Text("To go on with it:"), Command(f"muonscale train {path} --resume")]
    elif not several:
        generate = Command(f'muonscale generate {path} "def "')
        blocks += [Text("To write text with its model:"), generate]
    return blocks


def _configuration(runs: Sequence[RunData]) -> list[Block]:
    known = [run for run in runs if run.config]
    if len(runs) == 1:
        blocks: list[Block] = [settings_table(run) for run in known]
    else:
        differences = differences_table(known) if len(known) > 1 else None
        same = Text("These runs have the same configuration but for their folders.")
        blocks = [Text("What differs:"), differences] if differences else [same]
    of = {run.label: f" of {run.label}" if len(runs) > 1 else "" for run in known}
    return blocks + [
        Verbatim(
            text=json.dumps(r.config, indent=2), caption=f"config.json{of[r.label]}", folded=True
        )
        for r in known
    ]


def _losses(runs: Sequence[RunData]) -> list[Block]:
    return [chart for unit in ("tokens", "step", "seconds") for chart in loss_charts(runs, unit)]


def _charts(measures: Iterable[Measure], runs: Sequence[RunData]) -> list[Block]:
    charts = (chart_of(measure, runs) for measure in measures)
    return [chart for chart in charts if chart is not None]


def _spikes(runs: Sequence[RunData]) -> list[Block]:
    return [Text(text) for run in runs if (text := _spike_text(run, len(runs) > 1))]


def _spike_text(run: RunData, several: bool) -> str:
    """Return which steps were spikes and how many were skipped; nothing where it is not recorded."""
    train = run.of_kind("train")
    if not train or not any("spikes" in record for record in train):
        return ""
    parts = []
    for length, what in LENGTHS.items():
        steps = spike_steps(run, length)
        listed = ", ".join(f"{step:,}" for step in steps[:LISTED])
        more = f" and {len(steps) - LISTED} more" if len(steps) > LISTED else ""
        parts.append(f"Spikes of {what}: " + (f"steps {listed}{more}." if steps else "none."))
    skipped = train[-1].get("skipped_steps")
    if finite(skipped):
        parts.append(f"Steps skipped for gradients that are not finite: {skipped}.")
    return (f"{run.label}: " if several else "") + " ".join(parts)


def _tables(table: Table | None) -> list[Block]:
    return [] if table is None else [table]


def _samples(runs: Sequence[RunData]) -> list[Block]:
    several = len(runs) > 1
    texts = {run.label: run.result.get("sample") or _sample_file(run) for run in runs}
    return [
        Verbatim(text=str(text), caption=label if several else "Written by the model at the end.")
        for label, text in texts.items()
        if text
    ]


def _sample_file(run: RunData) -> str:
    try:
        return (run.path / "sample.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
