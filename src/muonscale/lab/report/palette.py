"""Assigns a color to each group of series, for light and dark pages.

The colors are Paul Tol's bright and vibrant schemes, which are distinguishable with any kind of
color vision. The dark page uses lighter versions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from muonscale.lab.report.page import Chart

DashT = Literal["solid", "dash", "dot"]

MUON, ADAMW, REFERENCE = "#4477aa", "#cc3311", "#666666"

OWN = {"adamw": ADAMW, "muon": MUON, "reference": REFERENCE}
"""Words in the name of a group that decide its color."""

SERIES = {
    MUON: "#77aadd",
    ADAMW: "#ff7755",
    "#228833": "#55bb66",
    "#aa3377": "#dd77bb",
    "#ee7733": "#ffaa66",
    "#0099bb": "#44ccee",
    "#aa9922": "#ddcc55",
    REFERENCE: "#bbbbbb",
}
"""Colors of series on white, and on the dark page."""

INK, GRID, EDGE, PAPER = "#1f2328", "#e4e7ea", "#59636e", "#ffffff"

FRAME = {INK: "#e6e9ec", GRID: "#31363c", EDGE: "#9aa4ae", PAPER: "#16181b"}
"""Colors of text, grid, axes with marks, and background: on white, and on the dark page."""

BAND = 0.18
"""Opacity of an interval."""

FAINT, PALEST = 0.45, 0.4
"""Opacity of faint points, and of the last of several lines that have one color."""

DASHES: tuple[DashT, ...] = ("solid", "dash", "dot")


@dataclass(frozen=True)
class Style:
    """How a group is drawn."""

    color: str
    """The color on white, a key of SERIES."""
    dash: DashT
    """Distinguishes groups of one color where there are more groups than colors."""


def styles(charts: Iterable[Chart]) -> dict[str, Style]:
    """Return the style of every group in charts that are shown together.

    A group has one style in all charts. Groups in one chart have different styles as long as there
    are enough; groups that never share a chart may share a style.
    """
    together: dict[str, set[str]] = defaultdict(set)
    for chart in charts:
        groups = dict.fromkeys(series.color_group for series in chart.series)
        for group in groups:
            together[group] |= groups.keys() - {group}
    # Where Muon or AdamW is on the page, no other group looks like them.
    named = any(_own_color(group) in (MUON, ADAMW) for group in together)
    colors = sorted(SERIES, key=lambda color: named and color in OWN.values())
    every = [Style(color, dash) for dash in DASHES for color in colors]
    assigned: dict[str, Style] = {}
    # Groups with their own colors choose first. In a chart only the first of a color gets it.
    for group in sorted(together, key=lambda group: _own_color(group) is None):
        taken = {assigned[other] for other in together[group] if other in assigned}
        free = [style for style in every if style not in taken] or every
        wanted = Style(_own_color(group) or "", "solid")
        assigned[group] = wanted if wanted in free else free[0]
    return assigned


def opacities(chart: Chart) -> list[float]:
    """Return the opacity of every series of a chart.

    Lines of one color that the legend names one by one, such as those of several target losses,
    are distinguishable by it. Faint points are always pale.
    """
    same_color: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, series in enumerate(chart.series):
        if chart.legend == "series" and series.kind != "faint":
            same_color[series.color_group, series.kind].append(number)
    found = [FAINT if series.kind == "faint" else 1.0 for series in chart.series]
    for numbers in same_color.values():
        for place, number in enumerate(numbers):
            found[number] = 1.0 - (1.0 - PALEST) * place / max(1, len(numbers) - 1)
    return found


def dark_colors() -> dict[str, str]:
    """Return the dark page's color for every color of a figure, including bands."""
    bands = {band_color(light): band_color(dark) for light, dark in SERIES.items()}
    return SERIES | FRAME | bands


def band_color(color: str) -> str:
    """Return the translucent color of an interval, in CSS."""
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{BAND})"


def _own_color(group: str) -> str | None:
    """Return the color that a group has because of its name."""
    return next((color for word, color in OWN.items() if word in group.lower()), None)
