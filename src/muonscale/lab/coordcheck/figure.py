"""A coordinate check as a picture: every quantity against the width, and its slope by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator

from muonscale.errors import ConfigError
from muonscale.lab.coordcheck.page import MEASURED, slope_chart, width_chart
from muonscale.lab.coordcheck.words import check_json, verdict_line
from muonscale.lab.report.page import Chart

COLORS = {
    "embedding": "#4477aa",
    "attention": "#ee6677",
    "attention logits": "#aa3377",
    "feed-forward": "#228833",
    "router": "#882255",
    "experts": "#ccbb44",
    "shared experts": "#999933",
    "residual stream": "#222222",
    "gains and biases": "#bbbbbb",
    "head": "#66ccee",
    "logits": "#ee7733",
}
"""Paul Tol's schemes, told apart by colour-blind readers."""


def write_check(facts: dict[str, Any], folder: Path) -> None:
    """Write `coordcheck.json`, `.png` and `.svg` into a folder, which is made.

    Raises:
        ConfigError: where that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "coordcheck.json").write_text(check_json(facts) + "\n", encoding="utf-8")
        figure = draw(facts)
        figure.savefig(folder / "coordcheck.png")
        figure.savefig(folder / "coordcheck.svg", metadata={"Date": None})
    except OSError as error:
        raise ConfigError(
            f"--out {folder} cannot be written: {error}; choose a folder that can be"
        ) from error


def draw(facts: dict[str, Any]) -> Figure:
    """Return the picture: a column for each quantity, above the width, below the slope by step."""
    figure = Figure(figsize=(13, 6.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(MEASURED), sharey="row")
    for column, quantity in enumerate(MEASURED):
        _draw_widths(panels[0, column], width_chart(facts, quantity))
        _draw_slopes(panels[1, column], slope_chart(facts, quantity))
    for row in panels:
        row[0].set_ylabel(row[0].get_label())
    parts = [part["part"] for part in facts["parts"]]
    handles = [Line2D([], [], color=_color(part), label=part) for part in parts]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(
        f"{facts['model']}, {facts['convention']}: {verdict_line(facts)}",
        fontsize="medium",
        parse_math=False,
    )
    return figure


def _draw_widths(axes: Axes, chart: Chart) -> None:
    widths = np.array(chart.series[0].x)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for exponent in (-0.5, 0.5, 1.0):
        axes.plot(widths, (widths / widths[0]) ** exponent, ":", color="#bbbbbb", linewidth=0.8)
    for series in chart.series:
        color = _color(series.group)
        low, high = np.array(series.low), np.array(series.high)
        axes.fill_between(series.x, low, high, color=color, alpha=0.12, linewidth=0)
        axes.plot(series.x, series.y, ".-", color=color, linewidth=1)
    axes.set_xticks(widths, [f"{width:g}" for width in widths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    _dress(axes, chart)


def _draw_slopes(axes: Axes, chart: Chart) -> None:
    low, high = sorted(mark.at for mark in chart.marks)
    axes.axhspan(low, high, color="#dddddd", linewidth=0)
    for series in chart.series:
        axes.plot(series.x, series.y, ".-", color=_color(series.group), linewidth=1)
    axes.set_ylim(-1.1, 1.3)
    _dress(axes, chart)
    axes.set_title("")


def _dress(axes: Axes, chart: Chart) -> None:
    axes.set_title(chart.title, fontsize="medium")
    axes.set_xlabel(chart.x_label)
    axes.set_label(chart.y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _color(part: str) -> str:
    return COLORS.get(part, "#555555")
