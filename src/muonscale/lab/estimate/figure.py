"""The facts of a plan as a picture: memory per device and time of a step, by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muonscale.errors import ConfigError
from muonscale.lab.console import bytes_text, seconds_text
from muonscale.lab.files import write_atomic
from muonscale.lab.report.matplotlib_charts import draw_panels
from muonscale.lab.report.page import Chart, Mark, Series

FORMATS = (".png", ".svg")

MEMORY = ("parameters", "gradients", "matrix_state", "elementwise_state", "average", "gathered",
          "unreduced", "activations", "logits", "step_workspace")  # fmt: skip

TIMES = {
    "passes": "passes",
    "exposed": "transfer of parameters, gradients",
    "activations": "transfer of activations",
    "newton_schulz": "Newton-Schulz",
    "exchange": "Muon's exchange",
    "elementwise": "elementwise",
}


FAR = 20
"""A device with this many times the memory of the peak is not drawn as a line."""


def check_format(path: Path) -> None:
    """Raise ConfigError for a suffix that is not in `FORMATS`, or a folder that does not exist."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--figure {path} must end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--figure {path}: there is no folder {path.parent}")


def write_figure(facts: dict[str, Any], path: Path) -> None:
    """Write the picture of a plan.

    Raises:
        ConfigError: if the file cannot be written.
    """
    layout = facts["layout"]
    title = (
        f"{Path(facts['model']['name']).name} on {layout['devices']:,} x {layout['device']}, "
        f"{layout['layout']}"
    )
    charts = memory_chart(facts["memory"]), time_chart(facts["time"])
    drawing = draw_panels([charts], title, size=(9, 5.5))
    try:
        write_atomic(path, drawing["png" if path.suffix == ".png" else "svg"])
    except OSError as error:
        raise ConfigError(f"--figure {path} cannot be written: {error}") from error


def memory_chart(memory: dict[str, Any]) -> Chart:
    """Return the memory at every moment of a step, and the device's unless it is far above.

    The label below the bars says how much the device has in either case.
    """
    unit, factor = ("GiB", 2**30) if memory["peak"] >= 2**30 else ("MiB", 2**20)
    moments = memory["moments"]
    device = f"memory of the device: {bytes_text(memory['device'])}"
    limit = Mark(axis="y", at=memory["device"] / factor, label=device)
    near = memory["peak"] > memory["device"] / FAR
    return Chart(
        name="memory",
        title="memory",
        x_label="moment of a step" if near else f"moment of a step\n{device}",
        y_label=f"{unit} per device",
        bars=tuple(moments),
        series=tuple(
            Series(
                name=name.replace("_", " "),
                x=tuple(map(float, range(len(moments)))),
                y=tuple(parts.get(name, 0) / factor for parts in moments.values()),
            )
            for name in MEMORY
            if any(parts.get(name) for parts in moments.values())
        ),
        marks=(limit,) if near else (),
    )


def time_chart(time: dict[str, Any]) -> Chart:
    """Return the parts of a step's time, beside the time of a step with AdamW."""
    unit, factor = ("seconds", 1.0) if time["step"] >= 1 else ("milliseconds", 1000.0)
    share = {part: time["parts"][part] / time["step"] for part in TIMES}
    return Chart(
        name="time",
        title="time",
        x_label="",
        y_label=f"{unit} per step",
        bars=("step",),
        series=tuple(
            Series(
                name=f"{name}: {seconds_text(time['parts'][part])} ({share[part]:.1%})",
                x=(0.0,),
                y=(factor * time["parts"][part],),
            )
            for part, name in TIMES.items()
            if time["parts"][part]
        ),
        marks=(Mark(axis="y", at=factor * time["adamw_step"], label="with AdamW"),),
    )
