"""A page as one HTML file that needs no network: plotly, styles and figures are inside of it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from muonscale.lab.report.axes import drawable
from muonscale.lab.report.page import Block, Chart, Page, Section, Table, Verdict
from muonscale.lab.report.palette import Style, dark_colors
from muonscale.lab.report.plotly_charts import figure_json

VERDICTS = {True: "holds", False: "fails", None: "open"}
"""Class of a verdict."""

_AMOUNT = r"[+\-\u2212]?[$]?(\d[\d,]*\.?\d*|\.\d+)(e[+\-]?\d+)?( ?(%|[kMGBT]?B|[kMBT]|ms|s|x))?"
NUMBER = re.compile(rf"{_AMOUNT}( ?(±|to) ?{_AMOUNT})?|nan|inf", re.IGNORECASE)
"""A number, perhaps with a unit, or an interval."""

BLANK = ("", "-", "\u2013", "\u2014")
"""Cells without a number among numbers."""


@dataclass(frozen=True)
class _Placed:
    """A section with what its place on the page adds."""

    id: str
    title: str
    part: str
    opens_part: bool
    heading: str
    blocks: tuple[Block, ...]


def page_html(page: Page, styles: Mapping[str, Style], drawings: Mapping[str, bytes]) -> str:
    """Return the text of report.html.

    Args:
        page: has passed `check_page`.
        styles: of every group of series, as `palette.styles` gives them.
        drawings: SVG of every chart by its name, shown where scripts are off.
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
        "verdict": _verdict,
        "column_classes": _column_classes,
        "captions": _captions,
        "chart_json": lambda chart: Markup(figure_json(chart, styles)),  # escaped for a script
        "svg": lambda chart: base64.b64encode(drawings[chart.name]).decode(),
    }
    environment.globals.update(functions)
    blocks = environment.get_template("blocks.html.j2").module
    return environment.get_template("page.html.j2").render(
        page=page,
        sections=_placed(page.sections),
        draw=partial(_draw, blocks),
        has_charts=bool(page.charts),
        css=_asset("page.css"),
        js=_asset("page.js"),
        plotly=Markup(get_plotlyjs()),
        dark_colors=Markup(json.dumps(dark_colors())),
    )


def is_number(cell: str) -> bool:
    """Return whether a cell of a table is a number or an interval, perhaps with a unit."""
    return NUMBER.fullmatch(cell.strip()) is not None


def _draw(blocks: object, block: Block) -> Markup:
    return getattr(blocks, type(block).__name__)(block)


def _asset(name: str) -> Markup:
    """Return a style or script of the package, which is not escaped."""
    folder = resources.files("muonscale.lab.report") / "templates"
    return Markup((folder / name).read_text("utf-8"))


def _placed(sections: tuple[Section, ...]) -> list[_Placed]:
    parts = ["", *(section.part for section in sections)]
    return [
        _Placed(
            id=f"section-{number}",
            title=section.title,
            part=section.part,
            opens_part=bool(part) and part != before,
            heading="h3" if part else "h2",
            blocks=section.blocks,
        )
        for number, (section, (before, part)) in enumerate(
            zip(sections, pairwise(parts), strict=True), start=1
        )
    ]


def _paragraphs(text: str) -> list[str]:
    """Return the parts of a text between empty lines."""
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part]


def _verdict(block: Verdict) -> tuple[str, str]:
    return VERDICTS[block.passed], f"{block.words.capitalize()}."


def _column_classes(table: Table) -> list[Markup]:
    """Return the attribute of the cells of every column."""
    columns = [[row[n].strip() for row in table.rows] for n in range(len(table.head))]
    numbers = [[cell for cell in column if cell not in BLANK] for column in columns]
    aligned = [bool(cells) and all(map(is_number, cells)) for cells in numbers]
    return [Markup(' class="number"') if right else Markup("") for right in aligned]


def _captions(chart: Chart) -> list[str]:
    return [text for text in (chart.caption, drawable(chart)[1]) if text]
