"""Charts as plotly figures in JSON, in the colours of a light page; the page's script darkens them."""

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
    axis_of,
    drawable,
    has_markers,
    number_text,
    smallest,
    tick_texts,
)
from muonscale.lab.report.page import Chart, Mark, Series, Surface
from muonscale.lab.report.palette import EDGE, GRID, INK, PAPER, Style, band_color

CONTOURS, COLORS = 12, "Cividis"

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def figure_json(chart: Chart, styles: Mapping[str, Style]) -> str:
    """Return data and layout of a plotly figure as JSON that may stand inside of a script element.

    Args:
        chart: what is drawn; it has passed `check_page`.
        styles: of every group, as `palette.styles` gives them.
    """
    chart, _ = drawable(chart)
    x, y = axis_of(chart, "x"), axis_of(chart, "y")
    surface = [] if chart.surface is None else _surface(chart.surface, chart)
    bands = [_band(series, styles[series.colored_as]) for series in chart.series]
    lines = [_line(series, chart, styles[series.colored_as]) for series in chart.series]
    layout = _layout(chart)
    layout |= {"xaxis": _axis(chart.x_label, x, chart.log_x)}
    # The page shows what y is above the axes: turned by 90 degrees it would not fit on a phone.
    layout |= {"yaxis": _axis("", y, chart.log_y)}
    if x is None or y is None:
        layout["annotations"] = [{"text": "no values", "showarrow": False}]
    drawn = [trace for trace in (*surface, *bands, *lines) if trace is not None]
    # Validation happens in go.Figure; `template` would otherwise be plotly's default, of 7 kB.
    return str(to_json(go.Figure(data=drawn, layout={**layout, "template": "none"})))


def _text(text: str) -> str:
    """Return text that plotly shows as it is, though it takes it for HTML."""
    return html.escape(text, quote=False)


def _line(series: Series, chart: Chart, style: Style) -> go.Scatter:
    parts = {"lines": series.kind != "points", "markers": has_markers(series)}
    return go.Scatter(
        x=series.x,
        y=series.y,
        name=_text(series.name),
        mode="+".join(part for part, there in parts.items() if there),
        legendgroup=_text(series.name),
        line={
            "color": style.color,
            "width": 2,
            "dash": "dash" if series.kind == "dashed" else style.dash,
        },
        marker={"color": style.color, "size": 7 if series.kind == "points" else 5},
        error_y=_error_bars(series),
        customdata=_interval_texts(series),
        hovertemplate=_hover(series, chart),
        showlegend=len(chart.series) > 1,
    )


def _hover(series: Series, chart: Chart) -> str:
    lines = [f"<b>{_text(series.name)}</b>", f"{_text(chart.x_label)}: %{{x:,.6~g}}"]
    interval = "" if series.low is None else " (%{customdata})"
    lines += [f"{_text(chart.y_label)}: %{{y:,.5~g}}{interval}"]
    return "<br>".join(lines) + "<extra></extra>"


def _interval_texts(series: Series) -> list[str] | None:
    if series.low is None or series.high is None:
        return None
    ends = zip(series.low, series.high, strict=True)
    return [f"{low:.5g} to {high:.5g}" for low, high in ends]


def _has_bars(series: Series) -> bool:
    return series.low is not None and series.kind in ("points", "both")


def _error_bars(series: Series) -> dict[str, Any] | None:
    if not _has_bars(series) or series.low is None or series.high is None:
        return None
    up = [_length(y, high) for y, high in zip(series.y, series.high, strict=True)]
    down = [_length(low, y) for low, y in zip(series.low, series.y, strict=True)]
    return {"type": "data", "array": up, "arrayminus": down, "thickness": 1.5, "width": 4}


def _length(start: float, end: float) -> float:
    return 0.0 if math.isnan(end - start) else max(end - start, 0.0)


def _band(series: Series, style: Style) -> go.Scatter | None:
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
        legendgroup=_text(series.name),
    )


def _surface(surface: Surface, chart: Chart) -> list[Any]:
    found = smallest(surface)
    assert found is not None  # `drawable` leaves no surface without values
    x, y, z = found
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
        "title": {"text": _text(label), "standoff": 8},
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
        axis |= {"tickvals": seen.ticks, "ticktext": tick_texts(seen.ticks)}
    elif max(map(abs, ends)) < 0.001:
        axis["exponentformat"] = "e"
    return axis


def _layout(chart: Chart) -> dict[str, Any]:
    return {
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "margin": {"l": 8, "r": 16, "t": 12, "b": 8},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": EDGE, "font": {"color": INK}},
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "maxheight": 0.4,
        },
        "shapes": [_mark(mark) for mark in chart.marks],
    }


def _mark(mark: Mark) -> dict[str, Any]:
    across = mark.axis == "y"
    place = (
        {"xref": "x domain", "x0": 0, "x1": 1, "y0": mark.at, "y1": mark.at}
        if across
        else {"yref": "y domain", "y0": 0, "y1": 1, "x0": mark.at, "x1": mark.at}
    )
    label = {"text": _text(mark.label), "font": {"color": EDGE, "size": 12}}
    label |= {"textposition": "end"} if across else {"textposition": "end", "textangle": 0}
    label |= {"yanchor": "bottom"} if across else {"xanchor": "right", "yanchor": "top"}
    line = {"color": EDGE, "width": 1, "dash": "dash"}
    return {"type": "line", "line": line, "label": label, **place}
