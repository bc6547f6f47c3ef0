"""The picture of router_balance.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from router_balance_runs import LABELS, Balanced

from muonscale.lab.report.matplotlib_charts import draw_panels
from muonscale.lab.report.page import Chart, Mark, Series

Values = Callable[[Balanced], np.ndarray]


def draw(runs: dict[str, list[Balanced]], limit: float, path: Path) -> None:
    """Draw MaxVio and the loads of the busiest and the least used expert, by step.

    Args:
        runs: by variant, the runs of all seeds.
        limit: load over the mean of an expert that every token chooses.
        path: the file to write.
    """
    violation = Chart(
        name="violation",
        title="Load violation, mean over layers",
        x_label="step",
        y_label="MaxVio",
        series=curves(runs, lambda run: run.violation),
    )
    loads = Chart(
        name="loads",
        title="Busiest (above) and least used expert (below) of any layer",
        x_label="step",
        y_label="load over the mean load",
        series=(*curves(runs, lambda run: run.worst + 1), *curves(runs, lambda run: run.quietest)),
        marks=(
            Mark(axis="y", at=limit, label="chosen by every token"),
            Mark(axis="y", at=1, label="balance"),
        ),
        y_limits=(0, 1.1 * limit),
    )
    title = "Experts with and without the update of the router bias"
    path.write_bytes(draw_panels([[violation, loads]], title, (12, 5.5))["png"])


def curves(runs: dict[str, list[Balanced]], values: Values) -> tuple[Series, ...]:
    """Return the means over seeds of every variant, with the range of the seeds."""
    found = []
    for variant, each in runs.items():
        of_seeds = np.array([values(run) for run in each])
        found.append(
            Series(
                name=LABELS[variant],
                group=LABELS[variant],
                x=tuple(range(1, of_seeds.shape[1] + 1)),
                y=tuple(of_seeds.mean(axis=0)),
                low=tuple(of_seeds.min(axis=0)),
                high=tuple(of_seeds.max(axis=0)),
            )
        )
    return tuple(found)
