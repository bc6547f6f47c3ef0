"""Charts and tables as CSV in full precision."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

from muonscale.lab.report.page import Chart, Table


def chart_files(chart: Chart) -> dict[str, str]:
    """Return the CSV files of a chart by their names.

    Series have the columns `series,x,y,low,high`; a mark is a row without the other coordinate. A
    surface has `x,y,z`. If a chart has both, the file of the series is called NAME-series.csv. A
    value that is not known is empty.
    """
    rows: list[Sequence[str]] = []
    for series in chart.series:
        none = (math.nan,) * len(series.x)
        values = zip(series.x, series.y, series.low or none, series.high or none, strict=True)
        rows += [[series.name, *map(_number, numbers)] for numbers in values]
    for mark in chart.marks:
        place = (_number(mark.at), "") if mark.axis == "x" else ("", _number(mark.at))
        rows.append([mark.label, *place, "", ""])
    files = {}
    if (surface := chart.surface) is not None:
        points = [
            [_number(x), _number(y), _number(z)]
            for y, values in zip(surface.y, surface.z, strict=True)
            for x, z in zip(surface.x, values, strict=True)
        ]
        files[f"{chart.name}.csv"] = _csv(("x", "y", "z"), points)
    if surface is None or rows:
        name = f"{chart.name}{'' if surface is None else '-series'}.csv"
        files[name] = _csv(("series", "x", "y", "low", "high"), rows)
    return files


def table_file(table: Table) -> str:
    """Return a table as CSV."""
    return _csv(table.head, table.rows)


def _number(value: float) -> str:
    """Return a number that reads back as the same float."""
    return "" if math.isnan(value) else repr(float(value))


def _csv(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()
