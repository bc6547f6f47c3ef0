"""A coordinate check as a page of a report. Made of `coordcheck.json` alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from muonscale.lab.coordcheck.slopes import UNKNOWN, Slope, fit_slope
from muonscale.lab.coordcheck.tolerances import CHANGE, QUANTITIES, SIZE, UPDATE, WEIGHT
from muonscale.lab.coordcheck.words import (
    HEAD,
    cells,
    heading,
    told_apart,
    verdict_line,
    worst_rows,
)
from muonscale.lab.report.page import Chart, Mark, Page, Section, Series, Table, Text, Verdict

MEASURED = (SIZE, CHANGE, WEIGHT, UPDATE)


def coordcheck_page(facts: dict[str, Any]) -> Page:
    """Return the report of a check.

    Args:
        facts: of `check_facts`, or read from `coordcheck.json`.
    """
    title = f"Coordinate check of {facts['model']}, {facts['convention']}"
    rows = tuple(cells(row) for row in worst_rows(facts["rows"]))
    verdict = (
        Verdict(told_apart(facts), verdict_line(facts)),
        *(Text(line) for line in heading(facts)),
        Table(head=HEAD, rows=rows, name="slopes", caption="The worst of each part and quantity."),
    )
    return Page(
        title=title,
        summary=verdict_line(facts),
        sections=(
            Section(title="Verdict", blocks=verdict),
            Section(
                title="Against the width", blocks=tuple(width_chart(facts, q) for q in MEASURED)
            ),
            Section(title="Slopes by step", blocks=tuple(slope_chart(facts, q) for q in MEASURED)),
        ),
    )


def width_chart(facts: dict[str, Any], quantity: str) -> Chart:
    """Return a quantity of the later steps against the width, relative to the smallest one."""
    series = []
    for entry in _entries(facts, quantity):
        seeds = [[_mean_log(facts, steps) for steps in seed] for seed in entry["values"]]
        relative = [[log - seed[0] for log in seed] for seed in seeds]
        columns = list(zip(*relative, strict=True))
        series.append(
            Series(
                name=entry["name"],
                group=entry["role"],
                x=tuple(map(float, facts["widths"])),
                y=tuple(math.exp(sum(c) / len(c)) for c in columns),
                low=tuple(math.exp(min(c)) for c in columns),
                high=tuple(math.exp(max(c)) for c in columns),
                kind="both",
            )
        )
    return Chart(
        name=f"{quantity}-by-width",
        title=QUANTITIES[quantity],
        x_label="width",
        y_label="relative to the smallest width",
        series=tuple(series),
        log_x=True,
        log_y=True,
        caption="Geometric means over the later steps and seeds, with the range of the seeds.",
    )


def slope_chart(facts: dict[str, Any], quantity: str) -> Chart:
    """Return the slope of a quantity after every step."""
    series = []
    steps = range(facts["steps"] + 1)
    for entry in _entries(facts, quantity):
        slopes = [_slope_at(facts, entry, step) for step in steps]
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
        marks=(
            Mark(axis="y", at=0.1, label="tolerance"),
            Mark(axis="y", at=-0.1, label="tolerance"),
        ),
    )


def _entries(facts: dict[str, Any], quantity: str) -> list[dict[str, Any]]:
    return [entry for entry in facts["values"] if entry["quantity"] == quantity]


def _mean_log(facts: dict[str, Any], steps: list[float | None]) -> float:
    late = [steps[step] for step in facts["judged_steps"]]
    logs = [math.log(value) if value else math.nan for value in late]
    return sum(logs) / len(logs)


def _slope_at(facts: dict[str, Any], entry: dict[str, Any], step: int) -> Slope:
    values = [[width[step] for width in seed] for seed in entry["values"]]
    if any(value is None for seed in values for value in seed):
        return UNKNOWN
    return fit_slope(facts["widths"], np.array(values))
