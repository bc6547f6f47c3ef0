"""Draws charts as PNG and SVG with matplotlib. The same chart gives the same bytes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from muonscale.lab.report.axes import (
    AxisT,
    axis_label,
    axis_of,
    drawable,
    has_markers,
    is_flops,
    minimum_of,
    number_text,
    tick_texts,
)
from muonscale.lab.report.page import Chart, Mark, Series, Surface
from muonscale.lab.report.palette import BAND, EDGE, GRID, INK, DashT, Style, opacities, styles

Drawing = dict[Literal["png", "svg"], bytes]
"""The contents of both files of a picture."""

SIZE, DPI = (8.0, 4.8), 150
"""Inches, and dots per inch of PNG."""

LINES: dict[DashT, Literal["-", "--", ":"]] = {"solid": "-", "dash": "--", "dot": ":"}
HATCHES = {"solid": "", "dash": "///", "dot": "..."}
"""Patterns of lines and of bars, by `Style.dash`."""

LABELED = 0.05
"""Layers of stacked bars that are at least this part of the axis high have their value in them."""

CONTOURS, COLORS = 12, "cividis_r"

SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "muonscale",  # makes the names in the file reproducible
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": EDGE,
    "ytick.color": EDGE,
    "axes.edgecolor": EDGE,
}


def draw(chart: Chart, styles: Mapping[str, Style]) -> Drawing:
    """Return a picture of one chart.

    Args:
        chart: a chart that `check_page` accepts.
        styles: the style of every group, from `palette.styles`.
    """
    with rc_context(SETTINGS):
        return _save(_figure(chart, styles))


def draw_panels(
    rows: Sequence[Sequence[Chart]], title: str, size: tuple[float, float] = SIZE
) -> Drawing:
    """Return one picture of several charts.

    Charts of a row with the same y label share the range of their y axes. If charts have groups in
    common, one legend of the groups is below all of them; otherwise each chart has its own legend.

    Args:
        rows: the charts of each row, from top to bottom; rows have the same length.
        title: the title of the picture.
        size: inches.
    """
    charts = [chart for row in rows for chart in row]
    groups = [{series.color_group for series in chart.series} for chart in charts]
    shared = any(groups[0] & others for others in groups[1:])
    together = replace(charts[0], series=tuple(s for chart in charts for s in chart.series))
    looks = styles([together] if shared else charts)
    with rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(textwrap.fill(title, round(14 * size[0])), fontsize="medium")
        panels = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        for row, axes in zip(rows, panels, strict=True):
            for chart, one in zip(_share_y(row), axes, strict=True):
                _draw_chart(one, chart, looks)
                if not shared:
                    handles, labels = one.get_legend_handles_labels()
                    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 2}
                    one.legend(handles, labels, frameon=False, fontsize="small", **place)
        if shared:
            keys = _group_keys(together, looks)
            figure.legend(handles=keys, loc="outside lower center", ncols=6, frameon=False)
        return _save(figure)


def _save(figure: Figure) -> Drawing:
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return {"png": png.getvalue(), "svg": svg.getvalue()}


def _share_y(charts: Sequence[Chart]) -> list[Chart]:
    if len({chart.y_label for chart in charts}) > 1:
        return list(charts)
    axes = [axis for chart in charts if (axis := axis_of(drawable(chart)[0], "y")) is not None]
    if not axes:
        return list(charts)
    limits = min(axis.low for axis in axes), max(axis.high for axis in axes)
    first, *rest = (replace(chart, y_limits=limits) for chart in charts)
    return [first, *(replace(chart, y_label="") for chart in rest)]


def _figure(chart: Chart, styles: Mapping[str, Style]) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    _draw_chart(figure.add_subplot(), chart, styles)
    if sum(series.kind != "faint" for series in chart.series) > 1:
        if chart.legend == "groups":
            handles = _group_keys(chart, styles)
            names = [str(handle.get_label()) for handle in handles]
        else:
            handles, names = figure.axes[0].get_legend_handles_labels()
        columns = max(1, min(len(names), 90 // (max(map(len, names)) + 8)))
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _group_keys(chart: Chart, styles: Mapping[str, Style]) -> list[Artist]:
    """Return a line for the legend for each group of a chart."""
    dashed = {s.color_group: s.kind == "dashed" for s in chart.series if s.kind != "faint"}
    return [
        Line2D(
            [],
            [],
            color=styles[group].color,
            linestyle="--" if dashed[group] else LINES[styles[group].dash],  # pyrefly: ignore
            label=group,
        )
        for group in dashed
    ]


def _draw_chart(axes: Axes, chart: Chart, styles: Mapping[str, Style]) -> None:
    chart, note = drawable(chart)
    below = [axis_label(chart.x_label, chart.log_x), note]
    _set_axis(axes, "x", chart)
    _set_axis(axes, "y", chart)
    if chart.surface is not None:
        below.append(_draw_surface(axes, chart.surface))
    if chart.bars:
        _draw_bars(axes, chart, styles)
    for series, opacity in () if chart.bars else zip(chart.series, opacities(chart), strict=True):
        _draw_series(axes, series, styles[series.color_group], opacity)
    for mark in chart.marks:
        _draw_mark(axes, mark)
    x, y = axis_of(chart, "x"), axis_of(chart, "y")
    if x is None or y is None:
        axes.text(0.5, 0.5, "no values", ha="center", transform=axes.transAxes)
    else:
        axes.set(xlim=(x.low, x.high), ylim=(y.low, y.high))
    axes.set_title(textwrap.fill(chart.title, 90), fontsize="medium")
    axes.set_xlabel("\n".join(filter(None, below)))
    axes.set_ylabel(textwrap.fill(axis_label(chart.y_label, chart.log_y), 50))
    axes.grid(color=GRID, linewidth=0.8, axis="y" if chart.bars else "both")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _set_axis(axes: Axes, which: AxisT, chart: Chart) -> None:
    axis, seen = getattr(axes, f"{which}axis"), axis_of(chart, which)
    log = chart.log_x if which == "x" else chart.log_y
    label = chart.x_label if which == "x" else chart.y_label
    names = chart.bars if which == "x" else ()
    if seen is None or not (log or names):
        letters = "TGMk" if is_flops(label) else "TBMk"
        axis.set_major_formatter(FuncFormatter(lambda v, _: number_text(v, letters=letters)))
        return
    if log:
        getattr(axes, f"set_{which}scale")("log")
    axis.set_major_locator(FixedLocator(list(seen.ticks)))
    axis.set_major_formatter(FixedFormatter(names or tick_texts(seen.ticks, label)))
    axis.set_minor_locator(NullLocator())


def _draw_bars(axes: Axes, chart: Chart, styles: Mapping[str, Style]) -> None:
    bottom = np.zeros(len(chart.bars))
    y = axis_of(chart, "y")
    smallest = 0.0 if y is None else LABELED * (y.high - y.low)
    label: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": "x-small"}
    for series in chart.series:
        style = styles[series.color_group]
        look: dict[str, Any] = {"color": style.color, "hatch": HATCHES[style.dash]}
        look |= {"edgecolor": "white", "linewidth": 0, "width": min(0.8, 0.3 * len(chart.bars))}
        axes.bar(series.x, series.y, bottom=bottom, label=series.name, **look)
        for x, at, value in zip(series.x, bottom, series.y, strict=True):
            if value >= smallest > 0:
                text = number_text(value, 3)
                box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "linewidth": 0}
                axes.text(x, at + value / 2, text, bbox=box | {"alpha": 0.85}, **label)
        bottom = bottom + series.y
    for x, total in enumerate(bottom):
        top = label | {"va": "bottom", "fontweight": "bold", "fontsize": "small"}
        axes.annotate(number_text(total, 3), (x, total), (0, 2), textcoords="offset points", **top)


def _draw_series(axes: Axes, series: Series, style: Style, opacity: float) -> None:
    if series.kind == "faint":
        points = {"color": style.color, "alpha": opacity, "zorder": 2}
        axes.plot(series.x, series.y, ".", markersize=2.5, **points)  # without a label
        return
    line = "--" if series.kind == "dashed" else LINES[style.dash]
    look: dict[str, Any] = {"color": style.color, "label": series.name, "zorder": 3}
    look["alpha"] = opacity
    look |= {"linestyle": "none" if series.kind == "points" else line}
    look |= {"linewidth": 1.2 if series.kind == "dashed" else 1.6}
    look |= {"marker": "o" if has_markers(series) else "none", "markersize": 4.5}
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


def _draw_surface(axes: Axes, surface: Surface) -> str:
    """Draw contours and a star at the smallest value; return a sentence about the star."""
    z = np.ma.masked_invalid(np.array(surface.z))
    contours = axes.contourf(surface.x, surface.y, z, levels=CONTOURS, cmap=COLORS, zorder=1)
    columns, rows = np.meshgrid(surface.x, surface.y)
    known = ~np.ma.getmaskarray(z)
    axes.plot(columns[known], rows[known], ".", color="white", markersize=3, zorder=2)
    axes.figure.colorbar(contours, ax=axes, label=surface.label)
    least = minimum_of(surface)
    if least is None:
        return ""
    star = {"markersize": 15, "color": "white", "markeredgecolor": "black", "zorder": 4}
    axes.plot(least[0], least[1], "*", clip_on=False, **star)
    x, y, value = map(number_text, least)
    return f"star: least {surface.label}, {value} at ({x}, {y})"
