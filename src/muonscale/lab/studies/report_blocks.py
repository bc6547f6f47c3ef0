"""Blocks, series and number formats that the reports of all studies share.

Findings come from JSON, where None stands for a number that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from muonscale.lab.report.page import (
    Block,
    Chart,
    ChartViews,
    Command,
    LineT,
    Page,
    PageSection,
    Series,
    Table,
    Text,
    Tile,
    Tiles,
    Verdict,
)
from muonscale.lab.studies.study import Outcomes

Found = Mapping[str, Any]
"""Findings, or a part of them."""

LOSS = "validation loss (nats per token)"


def format_or_dash(value: float | None, form: str = ".4f") -> str:
    """Return a number as text, a dash where there is none."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def format_interval(row: Found, form: str = ".4f", missing: str = "-") -> str:
    """Return the ends `low` and `high` of an interval as text; None at the high end is infinite."""
    if row["low"] is None:
        return missing
    high = math.inf if row["high"] is None else row["high"]
    return f"{row['low']:{form}} to {high:{form}}"


def format_with_interval(row: Found, form: str, value: str = "value") -> str:
    """Return a number with its interval in brackets, if it has one."""
    ends = "" if row["low"] is None else f" ({format_interval(row, form)})"
    return f"{row[value]:{form}}{ends}"


def interval_series(
    name: str,
    rows: Sequence[Found],
    x: str,
    y: str,
    *,
    ends: tuple[str, str] | None = ("low", "high"),
    kind: LineT = "both",
    group: str = "",
) -> Series:
    """Return a series of one point per row.

    Args:
        name: name of the series.
        rows: rows of the findings.
        x: key of the horizontal values.
        y: key of the vertical values.
        ends: keys of the ends of the intervals; None for a series without intervals.
        kind: how the series is drawn.
        group: series of one group have one color.
    """

    def column(key: str) -> tuple[float, ...]:
        return tuple(math.nan if row[key] is None else row[key] for row in rows)

    low, high = (column(key) for key in ends) if ends else (None, None)
    return Series(name=name, x=column(x), y=column(y), low=low, high=high, kind=kind, group=group)


def seed_series(name: str, points: Iterable[Found], x: str, kind: LineT = "both") -> Series:
    """Return mean losses with bars from the lowest to the highest seed, without diverged points.

    Args:
        name: name of the series.
        points: rows with a `mean` and `losses` by seed.
        x: key of the horizontal values.
        kind: how the series is drawn.
    """
    rows = []
    for point in points:
        if point["mean"] is not None:
            losses = [loss for loss in point["losses"].values() if loss is not None]
            rows.append({**point, "low": min(losses), "high": max(losses)})
    return interval_series(name, rows, x, "mean", kind=kind)


def keep_nonempty(*charts: Chart) -> list[Block]:
    """Return the charts that have something to show: a study that has just begun has few."""
    return [chart for chart in charts if chart.surface or any(s.x for s in chart.series)]


MOST_VERDICTS = 3
"""More verdicts than these begin a report by the first of them alone."""


def begin_with_result(
    page: Page, verdicts: Sequence[Verdict], tiles: Iterable[Tile], chart: str
) -> Page:
    """Return a report whose first section is its result: verdicts, tiles, and one chart.

    Args:
        page: the whole report.
        verdicts: verdicts of the page, the most important first. They are moved.
        tiles: numbers to be seen first.
        chart: name of the chart, or of the first of a switch, that is moved, if the page has it.
    """
    headline = verdicts if len(verdicts) <= MOST_VERDICTS else verdicts[:1]

    def is_moved(block: Block) -> bool:
        name = block.charts[0].name if isinstance(block, ChartViews) else ""
        name = block.name if isinstance(block, Chart) else name
        return name == chart or any(block is verdict for verdict in headline)

    figures = (b for b in page.blocks if not isinstance(b, Verdict) and is_moved(b))
    numbers = tuple(tiles)
    blocks = (*headline, *([Tiles(numbers)] if numbers else []), *figures)
    if not blocks:
        return page
    rest = (
        replace(section, blocks=tuple(b for b in section.blocks if not is_moved(b)))
        for section in page.sections
    )
    first = PageSection(title="Result", blocks=blocks)
    return replace(page, sections=(first, *(section for section in rest if section.blocks)))


def closing_sections(found: Found, outcomes: Outcomes, command: str) -> list[PageSection]:
    """Return the sections at the end of every report: failed runs, and how the study was done."""
    sections = []
    if found["failed"]:
        rows = tuple((item["run"], item["reason"]) for item in found["failed"])
        text = Text(
            "These runs ended without a result. They are in no figure and in no number above."
        )
        table = Table(head=("run", "reason"), rows=rows)
        sections.append(PageSection(title="Failed runs", blocks=(text, table)))
    done = [o for o in outcomes.values() if o.result is not None]
    facts: dict[str, set[str]] = {}
    for outcome in done:
        env = outcome.folder.environment()  # empty if the file was removed
        of_device = {"device": env.get("device_name"), "threads": env.get("threads")}
        for key, value in (env.get("versions", {}) | of_device).items():
            facts.setdefault(key, set()).add("unknown" if value is None else str(value))
    rows = tuple((key, ", ".join(sorted(values))) for key, values in facts.items())
    times = [outcome.train_seconds for outcome in done]
    hours = sum(seconds for seconds in times if seconds is not None) / 3600
    count = f"{len(done)} of {len(outcomes)} runs have finished, with {hours:.2f} hours of training steps"
    if unknown := times.count(None):
        count += f", without those of {unknown} whose times are lost"
    blocks = (Command(command), Table(head=("what", "value"), rows=rows), Text(f"{count}."))
    return [*sections, PageSection(title="How it was done", blocks=blocks)]
