"""Blocks that the reports of all studies have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from muonscale.lab.report.page import Block, Chart, Command, Section, Table, Text
from muonscale.lab.studies.config import StudyConfig
from muonscale.lab.studies.study import Outcomes


def command_block(config: StudyConfig) -> Command:
    """Return the command that does the study: by its name, if it comes with the package."""
    from muonscale.lab.studies.kinds import load_study, study_names

    for name in study_names():
        shipped = load_study(name, [f"path={json.dumps(str(config.path))}"]).config
        if shipped == config:
            return Command(f"muonscale study run {name}")
    return Command(f"muonscale study run {config.path}")


def drawn(*charts: Chart) -> list[Block]:
    """Return the charts that have something to show: a study that has just begun has few."""
    return [chart for chart in charts if chart.surface or any(s.x for s in chart.series)]


def failures_section(found: Mapping[str, Any]) -> list[Section]:
    """Return what failed and why; nothing where nothing did."""
    if not found.get("failed"):
        return []
    rows = tuple((item["run"], item["reason"]) for item in found["failed"])
    text = Text("These runs ended without a result. They are in no figure and in no number above.")
    return [Section(title="Failed runs", blocks=(text, Table(head=("run", "reason"), rows=rows)))]


def versions_section(outcomes: Outcomes) -> Section:
    """Return what the runs were done with: versions, device, threads, seconds."""
    done = [o for o in outcomes.values() if o.result is not None]
    facts: dict[str, set[str]] = {}
    for outcome in done:
        env = outcome.folder.environment()
        rows = {**env["versions"], "device": env["device_name"], "threads": env["threads"]}
        for key, value in rows.items():
            facts.setdefault(key, set()).add(str(value))
    hours = sum(o.result["train_seconds"] for o in done if o.result is not None) / 3600
    return Section(
        title="How it was done",
        blocks=(
            Table(
                head=("what", "value"),
                rows=tuple((key, ", ".join(sorted(values))) for key, values in facts.items()),
            ),
            Text(
                f"{len(done)} finished runs of {len(outcomes)}, {hours:.2f} hours of training steps."
            ),
        ),
    )
