"""Whether a page can be drawn: names of files, lengths of series, shapes of surfaces."""

from __future__ import annotations

import re
from collections import Counter

from muonscale.errors import StudyError
from muonscale.lab.report.page import Chart, Page, Series, Surface, Table

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
                f"a chart or table is called {name!r}; accepted: letters, digits, '.', '_' and '-'"
            )
        if count > 1:
            raise StudyError(
                f"{count} charts or tables of a page are called {name!r}; give each a name of its own"
            )
    for chart in page.charts:
        _check_chart(chart)
    for table in page.tables:
        _check_table(table)


def _check_chart(chart: Chart) -> None:
    if not chart.series and chart.surface is None:
        raise StudyError(
            f"chart {chart.name!r} has neither series nor a surface; it needs one of them"
        )
    for series in chart.series:
        _check_series(chart, series)
    if chart.surface is not None:
        _check_surface(chart, chart.surface)
    if chart.y_limits is not None and not chart.y_limits[0] < chart.y_limits[1]:
        raise StudyError(
            f"chart {chart.name!r}: y_limits {chart.y_limits} are not (low, high)"
            "; give two numbers, the smaller one first"
        )


def _check_series(chart: Chart, series: Series) -> None:
    if (series.low is None) != (series.high is None):
        raise StudyError(
            f"chart {chart.name!r}, series {series.name!r}: low and high belong together"
            "; give both or none"
        )
    given = {"x": series.x, "y": series.y, "low": series.low, "high": series.high}
    lengths = {name: len(values) for name, values in given.items() if values is not None}
    if len(set(lengths.values())) > 1:
        raise StudyError(
            f"chart {chart.name!r}, series {series.name!r}: unequal lengths {lengths}"
            "; they must be equal"
        )


def _check_surface(chart: Chart, surface: Surface) -> None:
    shape, wanted = [len(row) for row in surface.z], [len(surface.x)] * len(surface.y)
    if shape != wanted:
        raise StudyError(
            f"chart {chart.name!r}: z has rows of {shape} values; {len(surface.y)} rows of "
            f"{len(surface.x)} are needed, one for every y of one for every x"
        )
    if len(surface.x) < 2 or len(surface.y) < 2:
        raise StudyError(
            f"chart {chart.name!r}: a surface over {len(surface.x)} x {len(surface.y)} points has no "
            "contours; it needs at least 2 x 2, and series draw a single row"
        )


def _check_table(table: Table) -> None:
    for row in table.rows:
        if len(row) != len(table.head):
            raise StudyError(
                f"table {table.name or table.caption!r}: a row of {len(row)} cells under a head of "
                f"{len(table.head)}: {row}"
                "; give every row a cell for each column"
            )
