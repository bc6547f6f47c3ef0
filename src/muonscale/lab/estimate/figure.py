"""The facts of a plan as a picture: memory per device and time of a step, by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from muonscale.errors import ConfigError

COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#999933", "#bbbbbb")
"""Paul Tol's bright scheme, told apart by colour-blind readers."""

RESIDENT = ("parameters", "gradients", "matrix_state", "elementwise_state")
PASSES = ("gathered", "unreduced", "activations", "logits")
TIMES = ("passes", "exposed", "activations", "newton_schulz", "exchange", "elementwise")


def draw(facts: dict[str, Any], path: Path) -> None:
    """Write the picture of a plan's facts.

    Raises:
        ConfigError: where the file cannot be written.
    """
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    memory, time = figure.subplots(1, 2)
    _draw_memory(memory, facts["memory"])
    _draw_time(time, facts["time"])
    layout = facts["layout"]
    figure.suptitle(
        f"{Path(facts['model']['name']).name} on {layout['devices']:,} x {layout['device']}, "
        f"{layout['layout']}",
        fontsize="medium",
        parse_math=False,
    )
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(
            f"--figure {path} cannot be written: {error}; choose a file that can be"
        ) from error


def _draw_memory(axes: Axes, memory: dict[str, Any]) -> None:
    """Stack what is there at every moment of a step, and draw the device's limit."""
    moments, unit = memory["moments"], _unit(memory["peak"])
    bottoms = [0.0] * len(moments)
    for name, color in zip(
        (*RESIDENT, *PASSES, "step_workspace"), (*COLORS, "#332288"), strict=True
    ):
        heights = [parts.get(name, 0) / unit[1] for parts in moments.values()]
        axes.bar(list(moments), heights, bottom=bottoms, color=color, label=name.replace("_", " "))
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    if memory["peak"] > memory["device"] / 3:
        axes.axhline(memory["device"] / unit[1], color="#555555", linestyle="--", label="device")
    axes.set_ylabel(f"{unit[0]} per device")
    axes.set_title("memory", fontsize="medium")
    _legend(axes)


def _unit(nbytes: int) -> tuple[str, int]:
    return ("GiB", 2**30) if nbytes >= 2**30 else ("MiB", 2**20)


def _draw_time(axes: Axes, time: dict[str, Any]) -> None:
    """Stack the parts of a step, in seconds or milliseconds, beside AdamW's as a line."""
    name, factor = ("s", 1.0) if time["step"] >= 1 else ("ms", 1000.0)
    bottom = 0.0
    for part, color in zip(TIMES, COLORS, strict=False):
        height = factor * time["parts"][part]
        axes.bar(["step"], [height], bottom=[bottom], color=color, width=0.4, label=_label(part))
        bottom += height
    axes.axhline(factor * time["adamw_step"], color="#555555", linestyle="--", label="with AdamW")
    axes.set_xlim(-0.6, 0.6)
    axes.set_ylabel(name)
    axes.set_title("time", fontsize="medium")
    _legend(axes)


def _label(part: str) -> str:
    labels = {
        "exposed": "parameters, gradients under way",
        "activations": "activations under way",
        "newton_schulz": "Newton-Schulz",
        "exchange": "Muon's exchange",
    }
    return labels.get(part, part.replace("_", " "))


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False,
        fontsize="small",
    )  # fmt: skip
