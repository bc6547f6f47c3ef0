"""Charts as PNG and SVG files, drawn by matplotlib. The same chart gives the same bytes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis as MatplotlibAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from muonscale.lab.report.axes import (
    Axis,
    AxisT,
    axis_of,
    drawable,
    has_markers,
    number_text,
    smallest,
    tick_texts,
)
from muonscale.lab.report.page import Chart, Mark, Series, Surface
from muonscale.lab.report.palette import BAND, EDGE, GRID, INK, Style

SIZE, DPI = (8.0, 4.8), 150
"""Inches, and dots per inch of PNG."""

LINES = {"solid": "-", "dash": "--", "dot": ":"}

CONTOURS, COLORS = 12, "cividis_r"

SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "muonscale",  # names in the file do not differ from run to run
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": EDGE,
    "ytick.color": EDGE,
    "axes.edgecolor": EDGE,
}


def draw(chart: Chart, styles: Mapping[str, Style]) -> dict[Literal["png", "svg"], bytes]:
    """Return the contents of a PNG and an SVG file.

    Args:
        chart: what is drawn; it has passed `check_page`.
        styles: of every group, as `palette.styles` gives them.
    """
    with rc_context(SETTINGS):
        figure = _figure(chart, styles)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return {"png": png.getvalue(), "svg": svg.getvalue()}


def _figure(chart: Chart, styles: Mapping[str, Style]) -> Figure:
    chart, note = drawable(chart)
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x, y = axis_of(chart, "x"), axis_of(chart, "y")
    _set_axis(axes.xaxis, "x", x, chart.log_x)
    _set_axis(axes.yaxis, "y", y, chart.log_y)
    below = [chart.x_label, note]
    if chart.surface is not None:
        _draw_surface(figure, axes, chart.surface)
        below.append(_least(chart.surface))
    for series in chart.series:
        _draw_series(axes, series, styles[series.colored_as])
    for mark in chart.marks:
        _draw_mark(axes, mark)
    if x is None or y is None:
        axes.text(0.5, 0.5, "no values", ha="center", transform=axes.transAxes)
    else:
        axes.set(xlim=(x.low, x.high), ylim=(y.low, y.high))
    axes.set_title(textwrap.fill(chart.title, 90), fontsize="medium")
    axes.set_xlabel("\n".join(filter(None, below)))
    axes.set_ylabel(textwrap.fill(chart.y_label, 50))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.series) > 1:
        figure.legend(loc="outside lower center", ncols=_columns(chart), frameon=False)
    return figure


def _set_axis(axis: MatplotlibAxis, which: AxisT, seen: Axis | None, log: bool) -> None:
    if seen is not None and log:
        getattr(axis.axes, f"set_{which}scale")("log")
        axis.set_major_locator(FixedLocator(list(seen.ticks)))
        axis.set_major_formatter(FixedFormatter(tick_texts(seen.ticks)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))


def _columns(chart: Chart) -> int:
    """Return how many names of series fit beside each other."""
    longest = max(len(series.name) for series in chart.series)
    return max(1, min(len(chart.series), 90 // (longest + 8)))


def _draw_series(axes: Axes, series: Series, style: Style) -> None:
    look: dict[str, Any] = {"color": style.color, "label": series.name, "zorder": 3}
    line = "--" if series.kind == "dashed" else LINES[style.dash]
    if series.kind == "points":
        line = "none"
    marker = "o" if has_markers(series) else "none"
    look |= {"linestyle": line, "marker": marker, "linewidth": 1.6, "markersize": 4.5}
    axes.plot(series.x, series.y, **look)
    if series.low is None or series.high is None:
        return
    if series.kind in ("points", "both"):
        y, low, high = (np.array(values) for values in (series.y, series.low, series.high))
        lengths = np.nan_to_num(np.maximum([y - low, high - y], 0))
        bars = {"ecolor": style.color, "elinewidth": 1.2, "capsize": 3}
        axes.errorbar(series.x, series.y, yerr=lengths, fmt="none", **bars)
    else:
        band = {"color": style.color, "alpha": BAND, "linewidth": 0, "zorder": 2}
        axes.fill_between(series.x, series.low, series.high, where=np.isfinite(series.y), **band)


def _draw_mark(axes: Axes, mark: Mark) -> None:
    line = {"color": EDGE, "linestyle": "--", "linewidth": 1, "zorder": 1}
    text = {"color": EDGE, "fontsize": "small", "textcoords": "offset points"}
    if mark.axis == "y":
        axes.axhline(mark.at, **line)
        where = axes.get_yaxis_transform()
        axes.annotate(mark.label, (1, mark.at), xycoords=where, xytext=(0, 3), ha="right", **text)
    else:
        axes.axvline(mark.at, **line)
        where = axes.get_xaxis_transform()
        place = {"xytext": (-3, 0), "ha": "right", "va": "top", "rotation": 90}
        axes.annotate(mark.label, (mark.at, 1), xycoords=where, **place, **text)


def _draw_surface(figure: Figure, axes: Axes, surface: Surface) -> None:
    z = np.ma.masked_invalid(np.array(surface.z))
    contours = axes.contourf(surface.x, surface.y, z, levels=CONTOURS, cmap=COLORS, zorder=1)
    columns, rows = np.meshgrid(surface.x, surface.y)
    known = ~np.ma.getmaskarray(z)
    axes.plot(columns[known], rows[known], ".", color="white", markersize=3, zorder=2)
    figure.colorbar(contours, ax=axes, label=surface.label)
    found = smallest(surface)
    if found is not None:
        star = {"markersize": 15, "color": "white", "markeredgecolor": "black", "zorder": 4}
        axes.plot(found[0], found[1], "*", clip_on=False, **star)


def _least(surface: Surface) -> str:
    found = smallest(surface)
    if found is None:
        return ""
    x, y, z = map(number_text, found)
    return f"star: least {surface.label}, {z} at ({x}, {y})"
