"""Charts and tables as CSV in full precision, and which columns of a table hold numbers."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence

from muonscale.lab.report.page import Chart, Table

_UNIT = r"%|[kMGBT]?B|[KMGT]iB|[kMGBTP]|ms|s|min|h|d|x"
_AMOUNT = rf"[+\-\u2212]?[$]?(\d[\d,]*\.?\d*|\.\d+)(e[+\-]?\d+)?( ?({_UNIT}))?"
NUMBER = re.compile(
    rf"{_AMOUNT}( ?(±|to) ?{_AMOUNT})?|\d+ (min|h|d) \d+ \w+|nan|inf", re.IGNORECASE
)
"""A number, an interval or a time such as 1 h 12 min, with or without a unit."""

BLANK = ("", "-", "?", "\u2013", "\u2014")
"""Cells that stand for a missing number."""


def is_number(cell: str) -> bool:
    """Return whether a cell of a table is a number or an interval, with or without a unit."""
    return NUMBER.fullmatch(cell.strip()) is not None


def is_number_column(cells: Iterable[str]) -> bool:
    """Return whether all cells that are not blank are numbers or per cent, and there is one."""
    known = [cell.removesuffix(" %") for cell in cells if cell.strip() not in BLANK]
    return bool(known) and all(map(is_number, known))


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
