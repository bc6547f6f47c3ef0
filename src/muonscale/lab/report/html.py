"""A page as one HTML file that needs no network: it contains plotly, styles and figures."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby, pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from muonscale.lab.console import is_number_column
from muonscale.lab.report.axes import drawable
from muonscale.lab.report.markdown import CODE
from muonscale.lab.report.page import Block, Chart, ChartViews, Page, Table, Verdict
from muonscale.lab.report.palette import Style, dark_colors
from muonscale.lab.report.plotly_charts import figure_json

VERDICTS = {True: "holds", False: "fails", None: "open"}
"""The CSS class of a verdict."""

ROW_CLASSES: dict[type, str] = {Chart: "pair", Verdict: "verdicts", Table: "side"}
"""Blocks that are put beside each other if they follow one another, with the CSS class: charts and
verdicts in two columns, tables as their widths allow."""


@dataclass(frozen=True)
class _PlacedSection:
    """A section with what its place on the page adds."""

    id: str
    title: str
    part: str
    opens_part: bool
    heading: str
    rows: tuple[tuple[Block, ...], ...]
    """Blocks that are beside each other where there is room, see `ROW_CLASSES`; others are alone."""


def page_html(
    page: Page, styles: Mapping[str, Style], drawings: Mapping[str, bytes] | None = None
) -> str:
    """Return the text of report.html.

    Args:
        page: a page that `check_page` accepts.
        styles: the style of every group of series, from `palette.styles`.
        drawings: the SVG of every chart by its name, shown where scripts are off. Without them
            the page is a live one: it links to no files, and loads itself again when the server
            that it comes from has a new version.
    """
    environment = Environment(
        loader=PackageLoader("muonscale.lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions: dict[str, Any] = {
        "paragraphs": _paragraphs,
        "rich": _rich,
        "verdict": lambda verdict: (VERDICTS[verdict.passed], f"{verdict.outcome.capitalize()}."),
        "column_classes": _column_classes,
        "captions": lambda chart: filter(None, (chart.caption, drawable(chart)[1])),
        "chart_json": lambda chart: Markup(figure_json(chart, styles)),  # escaped for a script
        "live": drawings is None,
        "smoothings": _smoothings,
        "svg": lambda chart: base64.b64encode(drawings[chart.name]).decode() if drawings else "",
    }
    environment.globals.update(functions)
    macros = environment.get_template("blocks.html.j2").module
    parts = ["", *(section.part for section in page.sections)]
    sections = [
        _PlacedSection(
            id=f"section-{number}",
            title=section.title,
            part=section.part,
            opens_part=bool(part) and part != before,
            heading="h3" if part else "h2",
            rows=_rows(section.blocks),
        )
        for number, (section, (before, part)) in enumerate(
            zip(page.sections, pairwise(parts), strict=True), start=1
        )
    ]
    return environment.get_template("page.html.j2").render(
        page=page,
        sections=sections,
        draw=lambda block: getattr(macros, type(block).__name__)(block),
        row_class=lambda row: len(row) > 1 and ROW_CLASSES[type(row[0])],
        has_charts=bool(page.charts),
        css=_asset("page.css"),
        js=_asset("page.js"),
        plotly=Markup(get_plotlyjs()),
        dark_colors=Markup(json.dumps(dark_colors())),
    )


def _asset(name: str) -> Markup:
    """Return a style sheet or script of the package, unescaped."""
    folder = resources.files("muonscale.lab.report") / "templates"
    return Markup((folder / name).read_text("utf-8"))


def _paragraphs(text: str) -> list[str]:
    """Return the parts of a text between empty lines."""
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part]


def _rich(text: str) -> Markup:
    """Return a sentence with what is between two backticks as code."""
    return Markup(CODE.sub(r"<code>\1</code>", str(escape(text))))


def _rows(blocks: Sequence[Block]) -> tuple[tuple[Block, ...], ...]:
    rows: list[tuple[Block, ...]] = []
    for kind, group in groupby(blocks, key=type):
        some = tuple(group)
        rows += [some] if kind in ROW_CLASSES else [(block,) for block in some]
    return tuple(rows)


def _smoothings(block: ChartViews) -> list[str]:
    """Return the kinds of smoothing that the curves of a chart have."""
    kinds = ([kind for kind, _ in series.smoothings] for series in block.charts[0].series)
    return max(kinds, key=len, default=[])


def _column_classes(table: Table) -> list[Markup]:
    """Return the attribute of the cells of every column."""
    columns = ([row[n] for row in table.rows] for n in range(len(table.head)))
    return [Markup(' class="number"' if is_number_column(column) else "") for column in columns]
