"""Which group of series has which colour, on a light and on a dark ground.

The colours are Paul Tol's (bright and vibrant schemes), which people with any kind of colour vision
can tell apart. On a dark ground they are lighter.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from muonscale.lab.report.page import Page

DashT = Literal["solid", "dash", "dot"]

MUON, ADAMW = "#4477aa", "#cc3311"

SERIES = {
    MUON: "#77aadd",
    ADAMW: "#ff7755",
    "#228833": "#55bb66",
    "#aa3377": "#dd77bb",
    "#ee7733": "#ffaa66",
    "#0099bb": "#44ccee",
    "#aa9922": "#ddcc55",
    "#666666": "#bbbbbb",
}
"""Colours of series: on white, and on the dark page."""

INK, GRID, EDGE, PAPER = "#1f2328", "#e4e7ea", "#59636e", "#ffffff"

FRAME = {INK: "#e6e9ec", GRID: "#31363c", EDGE: "#9aa4ae", PAPER: "#16181b"}
"""Text, grid lines, axes and marks, and the ground: on white, and on the dark page."""

BAND = 0.18
"""Opacity of an interval."""

DASHES: tuple[DashT, ...] = ("solid", "dash", "dot")


@dataclass(frozen=True)
class Style:
    """How a group is drawn."""

    color: str
    """On white: a key of SERIES."""
    dash: DashT
    """Tells groups of one colour apart, where there are more groups than colours."""


def styles(page: Page) -> dict[str, Style]:
    """Return the style of every group of a page.

    A group has one style in all charts. Groups that meet in a chart differ, as long as there are
    styles; groups that never meet may look alike.
    """
    met: dict[str, set[str]] = defaultdict(set)
    for chart in page.charts:
        groups = {series.colored_as for series in chart.series}
        for group in groups:
            met[group] |= groups - {group}
    order = dict.fromkeys(s.colored_as for chart in page.charts for s in chart.series)
    every = [Style(color, dash) for dash in DASHES for color in SERIES]
    found: dict[str, Style] = {}
    for group in sorted(order, key=lambda group: _wanted(group) is None):
        taken = {found[other] for other in met[group] if other in found}
        free = [style for style in every if style not in taken] or every
        # One group has the colour of its optimizer; a second one is told apart better by another.
        wanted = [style for style in free if style == Style(_wanted(group) or "", "solid")]
        found[group] = (wanted or free)[0]
    return found


def dark_colors() -> dict[str, str]:
    """Return what every colour of a figure becomes on the dark page, bands included."""
    bands = {band_color(light): band_color(dark) for light, dark in SERIES.items()}
    return SERIES | FRAME | bands


def band_color(color: str) -> str:
    """Return the translucent colour of an interval, in CSS."""
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{BAND})"


def _wanted(group: str) -> str | None:
    """Return the colour that a group has because of its name."""
    name = group.lower()
    if "adamw" in name:
        return ADAMW
    return MUON if "muon" in name else None
