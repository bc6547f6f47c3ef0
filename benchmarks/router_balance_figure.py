"""The picture of router_balance.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from router_balance_runs import LABELS, Balanced

COLORS = {"bias": "#4477aa", "off": "#cc3311"}
LINE_COLOR = "#555555"


def draw(runs: dict[str, list[Balanced]], limit: float, path: Path) -> None:
    """Draw MaxVio and the loads of the busiest and the least used expert, by step.

    Args:
        limit: load over the mean of an expert that every token chooses.
    """
    figure = Figure(figsize=(11, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, each in runs.items():
        _draw_seeds(left, [run.violation for run in each], name, LABELS[name])
        _draw_seeds(right, [run.worst + 1 for run in each], name, LABELS[name])
        _draw_seeds(right, [run.quietest for run in each], name, None)
    for level, text in ((limit, "chosen by\nevery token"), (1, "balance")):
        right.axhline(level, color=LINE_COLOR, linestyle="--", linewidth=1)
        right.annotate(
            text,
            (1, level),
            xycoords=right.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=LINE_COLOR,
            fontsize="small",
        )
    _dress(left, "Load violation, mean over layers", "MaxVio")
    _dress(
        right,
        "Busiest (above) and least used expert (below) of any layer",
        "load over the mean load",
    )
    right.set_ylim(top=1.1 * limit)
    figure.savefig(path)


def _draw_seeds(axes: Axes, each: list[np.ndarray], name: str, label: str | None) -> None:
    steps = np.arange(1, len(each[0]) + 1)
    for values in each:
        axes.plot(steps, values, color=COLORS[name], linewidth=0.6, alpha=0.4)
    axes.plot(steps, np.mean(each, axis=0), color=COLORS[name], linewidth=2, label=label)


def _dress(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_xlim(left=1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
