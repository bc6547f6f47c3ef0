"""The charts of a telescope: surfaces, U-curves, drift of the optimum, loss by width."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from muonscale.lab.report.page import Chart, Series, Surface

if TYPE_CHECKING:
    from muonscale.lab.studies.telescope.config import TelescopeConfig

Found = Mapping[str, Any]
LOSS = "held-out loss (nats per token)"
POINTS = 60
"""Of a fitted curve."""


def number_text(value: float | None) -> str:
    """Return a loss for people; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def level_charts(config: TelescopeConfig, level: Found, number: int) -> list[Chart]:
    """Return the surfaces of a level: one for every two hyper-parameters, the others at their best."""
    if level["best"] is None:
        return []
    names = list(config.hyperparameters)
    return [
        _surface_chart(config, level, number, x, y)
        for x, y in itertools.combinations(names, 2)
        if level["shape"][names.index(x)] > 1 and level["shape"][names.index(y)] > 1
    ]


def _surface_chart(config: TelescopeConfig, level: Found, number: int, x: str, y: str) -> Chart:
    best = level["best"]
    shown = {
        (p["values"][x], p["values"][y]): p["mean"]
        for p in level["places"]
        if all(p["values"][name] == best[name] for name in best if name not in (x, y))
    }
    xs, ys = sorted({a for a, _ in shown}), sorted({b for _, b in shown})
    z = tuple(tuple(_finite(shown.get((a, b))) for a in xs) for b in ys)
    others = ", ".join(f"{name} {best[name]:g}" for name in best if name not in (x, y))
    return Chart(
        name=f"surface-{number}-{x}-{y}",
        title=f"Loss at width {level['width']}",
        x_label=config.hyperparameters[x].key,
        y_label=config.hyperparameters[y].key,
        surface=Surface(x=tuple(xs), y=tuple(ys), z=z, label=LOSS),
        log_x=True,
        log_y=True,
        caption=f"Mean over seeds{f', at {others}' if others else ''}. Where a run diverged there is none.",
    )


def _finite(value: float | None) -> float:
    return math.nan if value is None or math.isinf(value) else value


def u_curves(found: Found, name: str) -> Chart:
    """Return loss by one hyper-parameter at every width, the others at their best, minima marked."""
    series: list[Series] = []
    for level in found["levels"]:
        line = _line(level, name)
        if not line:
            continue
        width = f"width {level['width']}"
        series.append(
            Series(
                name=width,
                x=tuple(x for x, *_ in line),
                y=tuple(y for _, y, *_ in line),
                low=tuple(low for *_, low, _ in line),
                high=tuple(high for *_, high in line),
                kind="line",
            )
        )
        lowest = min(line, key=lambda point: point[1])
        name_of_lowest = f"{width}, lowest"
        x, y = (lowest[0],), (lowest[1],)
        series.append(Series(name=name_of_lowest, x=x, y=y, kind="points", group=width))
    return Chart(
        name=f"u-curves-{name}",
        title=f"Loss by {name}",
        x_label=f"{found['hyperparameters'][name]}, as a value of the base width",
        y_label=LOSS,
        log_x=True,
        series=tuple(series),
        caption="Through the optimum of every width; the lowest points are marked. Mean over seeds; bars reach from the "
        "lowest to the highest. Values at which a run diverged have no point.",
    )


def _line(level: Found, name: str) -> list[tuple[float, float, float, float]]:
    """Return value, mean loss, lowest and highest of the places along one hyper-parameter."""
    best = level["best"]
    if best is None:
        return []
    found = []
    for place in level["places"]:
        values, losses = place["values"], [x for x in place["losses"].values() if x is not None]
        beside = all(values[other] == best[other] for other in best if other != name)
        if beside and math.isfinite(_finite(place["mean"])):
            found.append((values[name], place["mean"], min(losses), max(losses)))
    return sorted(found)


def drift_chart(found: Found, name: str) -> Chart:
    """Return the optimum along one hyper-parameter against 1/width, with its fit."""
    points = [
        (1 / level["width"], level["optima"][name])
        for level in found["levels"]
        if level["optima"].get(name) and level["optima"][name]["at"] is not None
    ]
    drift = found["drift"][name]
    closed = all(optimum["low"] is not None for _, optimum in points)
    ends = np.linspace(0.0, max(1 / level["width"] for level in found["levels"]), POINTS)
    middle, slope = math.log(drift["infinite"]["value"]), drift["slope"]["value"]
    measured = Series(
        name="optimum",
        x=tuple(x for x, _ in points),
        y=tuple(o["at"] for _, o in points),
        low=tuple(o["low"] for _, o in points) if closed else None,
        high=tuple(o["high"] for _, o in points) if closed else None,
        kind="points",
    )
    fit = Series(
        name="fit",
        x=tuple(ends.tolist()),
        y=tuple(np.exp(middle + slope * ends).tolist()),
        kind="dashed",
    )
    return Chart(
        name=f"drift-{name}",
        title=f"Where {name} is best",
        x_label="1 / width",
        y_label=found["hyperparameters"][name],
        log_y=True,
        series=(measured, fit),
    )


def law_chart(found: Found) -> Chart:
    """Return the lowest loss by width, with its law."""
    law = found["law"]
    widths, losses = np.array(law["widths"]), tuple(law["losses"])
    series = [Series(name="lowest loss", x=tuple(widths.tolist()), y=losses, kind="points")]
    if not law["note"]:
        p = {name: part["value"] for name, part in law["parameters"].items()}
        x = np.geomspace(widths.min(), widths.max(), POINTS)
        y = p.get("offset", 0.0) + p["coefficient"] * x ** -p["exponent"]
        series.append(Series(name="fit", x=tuple(x.tolist()), y=tuple(y.tolist()), kind="dashed"))
    return Chart(
        name="loss-by-width",
        title="Loss against width",
        x_label="width",
        y_label=LOSS,
        log_x=True,
        series=tuple(series),
        caption="Mean over seeds at the best place of every width, and of the target.",
    )
