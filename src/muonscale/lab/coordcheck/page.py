"""A coordinate check as a page of a report and as a picture. Both need `coordcheck.json` alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from muonscale.errors import ConfigError, StudyError
from muonscale.lab.coordcheck.slopes import UNKNOWN, fit_slope
from muonscale.lab.coordcheck.text import (
    HEAD,
    cells,
    has_passed,
    heading,
    verdict_line,
    worst_rows,
)
from muonscale.lab.coordcheck.tolerances import CHANGE, QUANTITIES, SIZE, UPDATE, WEIGHT
from muonscale.lab.files import read_object, write_atomic, write_json
from muonscale.lab.report.matplotlib_charts import Drawing, draw_panels
from muonscale.lab.report.page import Chart, Mark, Page, PageSection, Series, Table, Text, Verdict

MEASURED = (SIZE, CHANGE, WEIGHT, UPDATE)

POWERS = (-0.5, 0.5, 1.0)
"""Exponents of the width that wrong rules have, drawn for comparison."""


def read_check_page(folder: Path) -> Page:
    """Return the report of the check in a folder.

    Raises:
        StudyError: if its `coordcheck.json` cannot be read.
    """
    path, remedy = folder / "coordcheck.json", "run the check again"
    try:
        return coordcheck_page(read_object(path, remedy, StudyError) or {})
    except (KeyError, TypeError) as error:
        raise StudyError(f"{path} is incomplete: {error!r}; {remedy}") from error


def coordcheck_page(facts: dict[str, Any]) -> Page:
    """Return the report of a check.

    Args:
        facts: the result of `check_facts`, or the content of `coordcheck.json`.
    """
    rows = tuple(cells(row) for row in worst_rows(facts["rows"]))
    claim = verdict_line(facts).partition(": ")[2]  # without PASS or FAIL, which the block says
    verdict = (
        Verdict(has_passed(facts), claim[0].upper() + claim[1:]),
        *(Text(line) for line in heading(facts)),
        Table(head=HEAD, rows=rows, name="slopes", caption="The worst of each part and quantity."),
    )
    widths, slopes = _charts(facts)
    return Page(
        title=f"Coordinate check of {facts['model']}, {facts['convention']}",
        summary=verdict_line(facts),
        sections=(
            PageSection(title="Verdict", blocks=verdict),
            PageSection(title="Against the width", blocks=widths),
            PageSection(title="Slopes by step", blocks=slopes),
        ),
    )


def write_check(facts: dict[str, Any], folder: Path) -> None:
    """Write `coordcheck.json`, `.png` and `.svg` into a folder, which is created.

    Raises:
        ConfigError: if they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "coordcheck.json", facts)
        for kind, data in draw_check(facts).items():
            write_atomic(folder / f"coordcheck.{kind}", data)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error}") from error


def draw_check(facts: dict[str, Any]) -> Drawing:
    """Return the picture: a column for each quantity, with the widths above the slopes by step."""
    widths, slopes = _charts(facts)
    slopes = tuple(
        replace(
            chart, y_limits=(-1.1, 1.3), title="", series=tuple(map(_without_band, chart.series))
        )
        for chart in slopes
    )
    title = f"{facts['model']}, {facts['convention']}: {verdict_line(facts)}"
    return draw_panels([widths, slopes], title, size=(14, 7))


def _without_band(series: Series) -> Series:
    return replace(series, low=None, high=None)


def _charts(facts: dict[str, Any]) -> tuple[tuple[Chart, ...], tuple[Chart, ...]]:
    """Return the charts against the width and those of the slopes, of every quantity in order."""
    return tuple(width_chart(facts, q) for q in MEASURED), tuple(
        slope_chart(facts, q) for q in MEASURED
    )


def width_chart(facts: dict[str, Any], quantity: str) -> Chart:
    """Return a quantity of the later steps against the width, relative to the smallest width."""
    widths = tuple(map(float, facts["widths"]))
    series = []
    for entry in facts["values"]:
        if entry["quantity"] != quantity:
            continue
        seeds = [[_mean_log(facts, steps) for steps in seed] for seed in entry["values"]]
        relative = [[log - seed[0] for log in seed] for seed in seeds]
        columns = list(zip(*relative, strict=True))
        series.append(
            Series(
                name=entry["name"],
                group=entry["role"],
                x=widths,
                y=tuple(math.exp(sum(c) / len(c)) for c in columns),
                low=tuple(math.exp(min(c)) for c in columns),
                high=tuple(math.exp(max(c)) for c in columns),
                kind="both",
            )
        )
    for power in POWERS:
        y = tuple((width / widths[0]) ** power for width in widths)
        name = f"width^{power:g}"
        series.append(Series(name=name, group="reference", x=widths, y=y, kind="dashed"))
    return Chart(
        name=f"{quantity}-by-width",
        title=QUANTITIES[quantity],
        x_label="width",
        y_label="relative to the smallest width",
        series=tuple(series),
        log_x=True,
        log_y=True,
        legend="groups",
        caption="Geometric means over the later steps and seeds, with the range of the seeds. "
        f"The references are powers of the width: {', '.join(f'{power:g}' for power in POWERS)}.",
    )


def slope_chart(facts: dict[str, Any], quantity: str) -> Chart:
    """Return the slope of a quantity after every step."""
    steps = range(facts["steps"] + 1)
    series = []
    for entry in facts["values"]:
        if entry["quantity"] != quantity:
            continue
        slopes = []
        for step in steps:
            values = [[width[step] for width in seed] for seed in entry["values"]]
            missing = any(value is None for seed in values for value in seed)
            slopes.append(UNKNOWN if missing else fit_slope(facts["widths"], np.array(values)))
        series.append(
            Series(
                name=entry["name"],
                group=entry["role"],
                x=tuple(map(float, steps)),
                y=tuple(slope.value for slope in slopes),
                low=tuple(slope.low for slope in slopes),
                high=tuple(slope.high for slope in slopes),
            )
        )
    return Chart(
        name=f"{quantity}-slopes",
        title=QUANTITIES[quantity],
        x_label="steps taken",
        y_label="slope",
        series=tuple(series),
        marks=tuple(Mark(axis="y", at=at, label=f"{at:+g}") for at in (0.1, -0.1)),
        legend="groups",
        caption="Dashed lines: the usual tolerance.",
    )


def _mean_log(facts: dict[str, Any], steps: list[float | None]) -> float:
    logs = [math.log(value) if (value := steps[at]) else math.nan for at in facts["judged_steps"]]
    return sum(logs) / len(logs)
