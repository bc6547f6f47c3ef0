"""Checks that a page can be drawn: names of files, lengths of series, shapes of surfaces."""

from __future__ import annotations

import re
from collections import Counter

from muonscale.errors import StudyError
from muonscale.lab.report.page import Chart, Page

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_page(page: Page) -> None:
    """Refuse a page that cannot be drawn or whose files would overwrite each other.

    Raises:
        StudyError: naming the chart or table.
    """
    tables = [table.name for table in page.tables if table.name]
    both = [f"{c.name}-series" for c in page.charts if c.surface is not None and c.series]
    names = Counter([chart.name for chart in page.charts] + tables + both)
    for name, count in names.items():
        if NAME.fullmatch(name) is None:
            raise StudyError(
                f"a chart or table is called {name!r}; use letters, digits, '.', '_' and '-'"
            )
        if count > 1:
            raise StudyError(f"{count} charts or tables of a page are called {name!r}")
    for chart in page.charts:
        _check_chart(chart)
    for table in page.tables:
        for row in table.rows:
            if len(row) != len(table.head):
                raise StudyError(
                    f"table {table.name or table.caption!r}: a row has {len(row)} cells and the "
                    f"head {len(table.head)}: {row}"
                )


def _check_chart(chart: Chart) -> None:
    def problem(text: str) -> StudyError:
        return StudyError(f"chart {chart.name!r}{text}")

    if not chart.series and chart.surface is None:
        raise problem(" has neither series nor a surface")
    for series in chart.series:
        if (series.low is None) != (series.high is None):
            raise problem(f", series {series.name!r}: give both low and high, or neither")
        given = dict(series.smoothings) | {
            "x": series.x,
            "y": series.y,
            "low": series.low,
            "high": series.high,
        }
        lengths = {name: len(values) for name, values in given.items() if values is not None}
        if chart.bars:
            lengths["bars"] = len(chart.bars)
        if len(set(lengths.values())) > 1:
            raise problem(f", series {series.name!r}: unequal lengths {lengths}")
    if (surface := chart.surface) is not None:
        shape, size = [len(row) for row in surface.z], [len(surface.x)] * len(surface.y)
        if shape != size:
            raise problem(
                f": z has rows of {shape} values; it needs {len(surface.y)} rows of "
                f"{len(surface.x)}, one row for every y"
            )
        if len(surface.x) < 2 or len(surface.y) < 2:
            raise problem(
                f": a surface of {len(surface.x)} x {len(surface.y)} points has no contours; it "
                "needs at least 2 x 2"
            )
    if chart.y_limits is not None and not chart.y_limits[0] < chart.y_limits[1]:
        raise problem(f": y_limits {chart.y_limits} are not (low, high)")
