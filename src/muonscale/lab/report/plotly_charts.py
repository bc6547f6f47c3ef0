"""Charts as plotly figures in JSON, in the colors of a light page, which a script darkens."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_json

from muonscale.lab.report.axes import (
    Axis,
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
from muonscale.lab.report.palette import EDGE, GRID, INK, PAPER, Style, band_color, opacities

CONTOURS, COLORS = 12, "Cividis"

PATTERNS = {"solid": "", "dash": "/", "dot": "."}
"""Patterns of bars, by `Style.dash`."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"

LAYOUT: dict[str, Any] = {
    # plotly's default template would add 7 kB to every figure
    "template": "none",
    "font": {"family": FONT, "size": 13, "color": INK},
    "paper_bgcolor": PAPER,
    "plot_bgcolor": PAPER,
    "margin": {"l": 8, "r": 16, "t": 12, "b": 8},
    "hovermode": "closest",
    "hoverdistance": 60,
    "barmode": "stack",
    "hoverlabel": {"bgcolor": PAPER, "bordercolor": EDGE, "font": {"color": INK}},
    "legend": {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1.02,
        "yanchor": "bottom",
        "maxheight": 0.4,
    },
}


def figure_json(chart: Chart, styles: Mapping[str, Style]) -> str:
    """Return data and layout of a plotly figure as JSON that is safe inside a script element.

    Args:
        chart: a chart that `check_page` accepts.
        styles: the style of every group, from `palette.styles`.
    """
    chart, _ = drawable(chart)
    x, y = axis_of(chart, "x"), axis_of(chart, "y")
    traces = [] if chart.surface is None else _surface(chart.surface, chart)
    if chart.bars:
        traces += [_bar(series, chart, styles[series.color_group]) for series in chart.series]
    else:
        # Bands come first, so that no band covers a line.
        bands = [_band(series, chart, styles[series.color_group]) for series in chart.series]
        traces += [band for band in bands if band is not None]
        named = set[str]()
        for series, opacity in zip(chart.series, opacities(chart), strict=True):
            style = styles[series.color_group]
            if series.kind == "faint":
                traces.append(_faint(series, chart, style, opacity))
                continue
            line = _line(series, chart, style)
            line.opacity = opacity
            if (key := _legend_key(series, chart)) in named:
                line.showlegend = False
            named.add(key)
            traces.append(line)
    layout = {**LAYOUT, "shapes": [_mark(mark) for mark in chart.marks]}
    x_axis = _axis(chart.x_label, x, chart.log_x)
    if _is_unified(chart):
        layout["hovermode"] = "x unified"
        title = f"{_text(chart.x_label)}: %{{x:,.6~g}}"
        x_axis |= {"unifiedhovertitle": {"text": title}}
    if chart.bars and x is not None:
        x_axis |= {"tickvals": x.ticks, "ticktext": chart.bars}
    # The page shows the y label above the axes: turned by 90 degrees it would not fit on a phone.
    y_axis = _axis(chart.y_label, y, chart.log_y) | {"title": {"text": ""}}
    layout |= {"xaxis": x_axis, "yaxis": y_axis}
    if x is None or y is None:
        layout["annotations"] = [{"text": "no values", "showarrow": False}]
    return str(to_json(go.Figure(data=traces, layout=layout)))


def _text(text: str) -> str:
    """Return text escaped for plotly, which interprets HTML."""
    return html.escape(text, quote=False)


def _is_unified(chart: Chart) -> bool:
    """Return whether one box shows the values of all curves at an x: a chart of lines does so."""
    drawn = [series.kind for series in chart.series if series.kind != "faint"]
    return chart.surface is None and not chart.bars and bool(drawn) and "points" not in drawn


def _legend_key(series: Series, chart: Chart) -> str:
    """Return the name that a series has in the legend; a click hides all series of one name."""
    return series.color_group if chart.legend == "groups" else series.name


def _bar(series: Series, chart: Chart, style: Style) -> go.Bar:
    pattern = {"shape": PATTERNS[style.dash], "fgcolor": "white"}
    return go.Bar(
        x=series.x,
        y=series.y,
        name=_text(series.name),
        marker={"color": style.color, "pattern": pattern},
        hovertemplate=f"<b>{_text(series.name)}</b><br>{_text(chart.y_label)}: "
        "%{y:,.5~g}<extra></extra>",
    )


def _line(series: Series, chart: Chart, style: Style) -> go.Scatter:
    modes = {"lines": series.kind != "points", "markers": has_markers(series)}
    hover = [f"<b>{_text(series.name)}</b>"]
    if _is_unified(chart):
        hover = [f"{hover[0]} %{{y:,.5~g}}"]
    else:
        hover.append(f"{_text(chart.x_label)}: %{{x:,.6~g}}")
        hover.append(f"{_text(chart.y_label)}: %{{y:,.5~g}}")
    intervals = error_bars = None
    if series.low is not None and series.high is not None:
        ends = list(zip(series.low, series.y, series.high, strict=True))
        intervals = [f"{low:.5g} to {high:.5g}" for low, _, high in ends]
        hover[-1] += " (%{customdata})"
        if _has_bars(series):
            error_bars = {"type": "data", "thickness": 1.5, "width": 4}
            error_bars |= {"array": [_length(y, high) for _, y, high in ends]}
            error_bars |= {"arrayminus": [_length(low, y) for low, y, _ in ends]}
    return go.Scatter(
        x=series.x,
        y=series.y,
        name=_text(_legend_key(series, chart)),
        mode="+".join(mode for mode, wanted in modes.items() if wanted),
        legendgroup=_text(_legend_key(series, chart)),
        line={
            "color": style.color,
            "width": 2,
            "dash": "dash" if series.kind == "dashed" else style.dash,
        },
        marker={"color": style.color, "size": 7 if series.kind == "points" else 5},
        error_y=error_bars,
        customdata=intervals,
        hovertemplate="<br>".join(hover) + "<extra></extra>",
        showlegend=sum(s.kind != "faint" for s in chart.series) > 1,
        meta={"smoothings": [y for _, y in series.smoothings]} if series.smoothings else None,
    )


def _faint(series: Series, chart: Chart, style: Style, opacity: float) -> go.Scatter:
    return go.Scatter(
        x=series.x,
        y=series.y,
        mode="markers",
        marker={"color": style.color, "size": 3.5},
        opacity=opacity,
        hoverinfo="skip",
        showlegend=False,
        legendgroup=_text(_legend_key(series, chart)),
    )


def _has_bars(series: Series) -> bool:
    return series.low is not None and series.kind in ("points", "both")


def _length(start: float, end: float) -> float:
    return 0.0 if math.isnan(end - start) else max(end - start, 0.0)


def _band(series: Series, chart: Chart, style: Style) -> go.Scatter | None:
    """Return the interval of a line: a polygon for every stretch without a gap."""
    if series.low is None or series.high is None or _has_bars(series):
        return None
    points = zip(series.x, series.y, series.low, series.high, strict=True)
    x: list[float | None] = []
    y: list[float | None] = []
    for gap, group in groupby(points, key=lambda point: any(map(math.isnan, point))):
        if not gap:
            stretch = list(group)
            x += [p[0] for p in stretch] + [p[0] for p in reversed(stretch)] + [None]
            y += [p[2] for p in stretch] + [p[3] for p in reversed(stretch)] + [None]
    return go.Scatter(
        x=x,
        y=y,
        fill="toself",
        fillcolor=band_color(style.color),
        line={"width": 0, "color": band_color(style.color)},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=_text(_legend_key(series, chart)),
    )


def _surface(surface: Surface, chart: Chart) -> list[Any]:
    minimum = minimum_of(surface)
    assert minimum is not None  # `drawable` removes a surface without values
    x, y, z = minimum
    label = _text(surface.label)
    hover = f"{_text(chart.x_label)}: %{{x:,.6~g}}<br>{_text(chart.y_label)}: %{{y:,.6~g}}"
    contour = go.Contour(
        x=surface.x,
        y=surface.y,
        z=surface.z,
        colorscale=COLORS,
        reversescale=True,
        ncontours=CONTOURS,
        connectgaps=False,
        line={"width": 0},
        colorbar={"title": {"text": label, "side": "right"}, "thickness": 14, "outlinewidth": 0},
        hovertemplate=f"{hover}<br>{label}: %{{z:.5~g}}<extra></extra>",
    )
    least = go.Scatter(
        x=[x],
        y=[y],
        mode="markers",
        marker={
            "symbol": "star",
            "size": 16,
            "color": "white",
            "line": {"color": "black", "width": 1},
        },
        hovertemplate=f"least {label}: {number_text(z)}<br>{hover}<extra></extra>",
        showlegend=False,
        cliponaxis=False,
    )
    known = [
        (column, row)
        for row, values in zip(surface.y, surface.z, strict=True)
        for column, value in zip(surface.x, values, strict=True)
        if not math.isnan(value)
    ]
    dots = go.Scatter(
        x=[point[0] for point in known],
        y=[point[1] for point in known],
        mode="markers",
        marker={"size": 3, "color": "white"},
        hoverinfo="skip",
        showlegend=False,
    )
    return [contour, dots, least]


def _axis(label: str, seen: Axis | None, log: bool) -> dict[str, Any]:
    axis: dict[str, Any] = {
        "title": {"text": _text(axis_label(label, log)), "standoff": 8},
        "automargin": True,
        "gridcolor": GRID,
        "linecolor": EDGE,
        "tickcolor": EDGE,
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "type": "log" if log else "linear",
    }
    if seen is None:
        return axis
    ends = [seen.low, seen.high]
    axis["range"] = [math.log10(end) for end in ends] if log else ends
    if log:
        axis |= {"tickvals": seen.ticks, "ticktext": tick_texts(seen.ticks, label)}
    elif is_flops(label):
        axis["exponentformat"] = "SI"
    elif max(map(abs, ends)) < 0.001:
        axis["exponentformat"] = "e"
    return axis


def _mark(mark: Mark) -> dict[str, Any]:
    across = mark.axis == "y"
    label = {"text": _text(mark.label), "font": {"color": EDGE, "size": 12}, "textposition": "end"}
    if across:
        place = {"xref": "x domain", "x0": 0, "x1": 1, "y0": mark.at, "y1": mark.at}
        label |= {"yanchor": "bottom"}
    else:
        place = {"yref": "y domain", "y0": 0, "y1": 1, "x0": mark.at, "x1": mark.at}
        label |= {"textangle": 0, "xanchor": "right", "yanchor": "top"}
    line = {"color": EDGE, "width": 1, "dash": "dash"}
    return {"type": "line", "line": line, "label": label, **place}
