"""The charts of a telescope: surfaces, U-curves, drift of the optimum, loss by width."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from muonscale.lab.report.page import Chart, Series, Surface
from muonscale.lab.studies.report_blocks import LOSS, Found, interval_series, seed_series
from muonscale.lab.studies.telescope.config import TelescopeConfig

POINTS = 60
"""Points of a fitted curve."""


def level_charts(config: TelescopeConfig, level: Found, number: int) -> Iterator[Chart]:
    """Yield a surface of a level for every two hyper-parameters, with the others at their best."""
    best, keys = level["best"], config.hyperparameters
    if best is None:
        return
    swept = [n for n, size in zip(keys, level["shape"], strict=True) if size > 1]
    for x, y in itertools.combinations(swept, 2):
        others = [name for name in best if name not in (x, y)]
        means = {
            (p["values"][x], p["values"][y]): math.nan if p["mean"] is None else p["mean"]
            for p in level["places"]
            if all(p["values"][name] == best[name] for name in others)
        }
        xs, ys = sorted({a for a, _ in means}), sorted({b for _, b in means})
        z = tuple(tuple(means.get((a, b), math.nan) for a in xs) for b in ys)
        at = ", ".join(f"{name} {best[name]:g}" for name in others)
        yield Chart(
            name=f"surface-{number}-{x}-{y}",
            title=f"Loss at width {level['width']}",
            x_label=keys[x].key,
            y_label=keys[y].key,
            surface=Surface(x=tuple(xs), y=tuple(ys), z=z, label=LOSS),
            log_x=True,
            log_y=True,
            caption=f"Mean over seeds{f', at {at}' if at else ''}. Places where a run diverged are "
            "empty.",
        )


def u_curves(found: Found, name: str) -> Chart:
    """Return loss by one hyper-parameter at every width, others at their best, minima marked."""
    series: list[Series] = []
    for level in found["levels"]:
        best, width = level["best"], f"width {level['width']}"
        if best is None:
            continue
        line = [
            {**p, "x": p["values"][name]}
            for p in level["places"]
            if p["mean"] is not None
            and all(p["values"][other] == best[other] for other in best if other != name)
        ]
        line.sort(key=lambda point: point["x"])
        if not line:
            continue
        series.append(seed_series(width, line, "x", kind="line"))
        lowest = min(line, key=lambda point: point["mean"])
        title = f"{width}, lowest"
        series.append(
            interval_series(title, [lowest], "x", "mean", ends=None, kind="points", group=width)
        )
    return Chart(
        name=f"u-curves-{name}",
        title=f"Loss by {name}",
        x_label=f"{found['hyperparameters'][name]}, as a value of the base width",
        y_label=LOSS,
        log_x=True,
        series=tuple(series),
        caption="Through the optimum of every width, with the lowest points marked. Mean over "
        "seeds; bars reach from the lowest to the highest. Values at which a run diverged have no "
        "point.",
    )


def drift_chart(found: Found, name: str) -> Chart:
    """Return the optimum along one hyper-parameter against 1/width, with its fit."""
    points = [
        {**level["optima"][name], "x": 1 / level["width"]}
        for level in found["levels"]
        if name in level["optima"] and level["optima"][name]["at"] is not None
    ]
    known = all(point["low"] is not None for point in points)
    ends = ("low", "high") if known else None
    places = np.linspace(0.0, max(1 / level["width"] for level in found["levels"]), POINTS)
    drift = found["drift"][name]
    middle, slope = math.log(drift["infinite"]["value"]), drift["slope"]["value"]
    fit = tuple(np.exp(middle + slope * places).tolist())
    return Chart(
        name=f"drift-{name}",
        title=f"Best {name} by width",
        x_label="1 / width",
        y_label=found["hyperparameters"][name],
        log_y=True,
        series=(
            interval_series("optimum", points, "x", "at", ends=ends, kind="points"),
            Series(name="fit", x=tuple(places.tolist()), y=fit, kind="dashed"),
        ),
    )


def law_chart(law: Found) -> Chart:
    """Return the lowest loss by width, with its law."""
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
