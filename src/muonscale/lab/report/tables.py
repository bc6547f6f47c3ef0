"""The numbers of charts and tables as CSV, in full precision. A value that is not known is empty."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence

from muonscale.lab.report.page import Chart, Series, Surface, Table


def chart_files(chart: Chart) -> dict[str, str]:
    """Return the CSV files of a chart by their names.

    One of `series,x,y,low,high`, a mark being a row without the other coordinate; of a surface one
    of `x,y,z`. Where a chart has both, the file of the series is called NAME-series.csv.
    """
    lines = (*(row for series in chart.series for row in _series(series)), *_marks(chart))
    files = {}
    if chart.surface is not None:
        files[f"{chart.name}.csv"] = _csv(("x", "y", "z"), _surface(chart.surface))
    if chart.surface is None or lines:
        name = f"{chart.name}{'-series' if chart.surface is not None else ''}.csv"
        files[name] = _csv(("series", "x", "y", "low", "high"), lines)
    return files


def table_file(table: Table) -> str:
    """Return a table as CSV."""
    return _csv(table.head, table.rows)


def _series(series: Series) -> Iterator[Sequence[str]]:
    none = (math.nan,) * len(series.x)
    ends = (series.low or none, series.high or none)
    for numbers in zip(series.x, series.y, *ends, strict=True):
        yield [series.name, *map(_number, numbers)]


def _marks(chart: Chart) -> Iterator[Sequence[str]]:
    for mark in chart.marks:
        at = _number(mark.at)
        yield [mark.label, *((at, "") if mark.axis == "x" else ("", at)), "", ""]


def _surface(surface: Surface) -> Iterator[Sequence[str]]:
    for y, row in zip(surface.y, surface.z, strict=True):
        for x, z in zip(surface.x, row, strict=True):
            yield [_number(x), _number(y), _number(z)]


def _number(value: float) -> str:
    """Return a number that reads back as the same float."""
    return "" if math.isnan(value) else repr(float(value))


def _csv(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(head), *rows])
    return text.getvalue()
