"""Charts of a batch study: tokens, steps and their ratio by batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from muonscale.lab.report.page import Block, Chart, Mark, Series
from muonscale.lab.studies.report_blocks import drawn

Tree = Mapping[str, Any]


def ratio_chart(targets: list[Tree], baseline: str) -> list[Block]:
    """Return R(B) of all targets."""
    series = [
        _ratio_series(ratio, f"{baseline} / {ratio['other']} to {target['target']:g}")
        for target in targets
        for ratio in target["ratios"]
    ]
    return _ratio_charts("ratio", "Ratio of tokens by batch size", series)


def predicted_chart(target: Tree, baseline: str, number: int) -> list[Block]:
    """Return R(B) of one target with what the three-regime laws predict."""
    series = []
    for ratio in target["ratios"]:
        name = f"{baseline} / {ratio['other']}"
        series.append(replace(_ratio_series(ratio, name), kind="points"))
        if ratio["predicted"] is not None:
            line = ratio["predicted"]
            series.append(
                Series(
                    name=f"{name}, three regimes",
                    x=tuple(line["x"]),
                    y=_gaps(line["y"]),
                    low=_gaps(line["low"]),
                    high=_gaps(line["high"]),
                    group=name,
                )
            )
    return _ratio_charts(f"ratio-{number}", "Ratio of tokens and what the laws predict", series)


def _ratio_series(ratio: Tree, name: str) -> Series:
    rows = [row for row in ratio["rows"] if row["ratio"] is not None and not row["censored"]]
    return Series(
        name=name,
        x=tuple(row["batch"] for row in rows),
        y=tuple(row["ratio"] for row in rows),
        low=_gaps(row["low"] for row in rows),
        high=_gaps(row["high"] for row in rows),
        kind="both",
        group=name,
    )


def _ratio_charts(name: str, title: str, series: list[Series]) -> list[Block]:
    return drawn(
        Chart(
            name=name,
            title=title,
            x_label="batch size (tokens)",
            y_label="ratio of tokens to the loss",
            log_x=True,
            series=tuple(series),
            marks=(Mark(axis="y", at=1.0, label="equal"),),
            caption="Above 1 the baseline takes more tokens. Bars and bands are 90 % intervals, seed by seed.",
        )
    )


LAWS = {
    "mccandlish": ("S = Smin + Emin/B", "The critical batch size is Emin/Smin."),
    "regimes": ("three regimes", "The critical batch size is where tokens begin to grow."),
}


def law_charts(target: Tree, number: int) -> list[Block]:
    """Return T(B) with each of the two laws, and S(B)."""
    charts = [
        Chart(
            name=f"tokens-{law}-{number}",
            title=f"Tokens to a loss of {target['target']:g}, {name}",
            x_label="batch size (tokens)",
            y_label="training tokens to the loss",
            log_x=True,
            log_y=True,
            series=tuple(
                series
                for variant in target["variants"]
                for series in (_measured(variant, steps=False), *_curve(variant, law))
            ),
            caption=f"{text} Points are means over seeds at the best learning rate with 90 % intervals, "
            "bands those of the law.",
        )
        for law, (name, text) in LAWS.items()
    ]
    charts.append(
        Chart(
            name=f"steps-{number}",
            title=f"Steps to a loss of {target['target']:g}",
            x_label="batch size (tokens)",
            y_label="optimizer steps to the loss",
            log_x=True,
            log_y=True,
            series=tuple(_measured(variant, steps=True) for variant in target["variants"]),
            caption="The tokens of the other charts over the batch size.",
        )
    )
    return drawn(*charts)


def _measured(variant: Tree, *, steps: bool) -> Series:
    places = [place for place in variant["places"] if place["tokens"] is not None]

    def values(key: str) -> tuple[float, ...]:
        each = _gaps(place[key] for place in places)
        batches = [place["batch"] if steps else 1 for place in places]
        return tuple(value / batch for value, batch in zip(each, batches, strict=True))

    return Series(
        name=variant["name"],
        x=tuple(place["batch"] for place in places),
        y=values("tokens"),
        low=values("low"),
        high=values("high"),
        kind="both" if steps else "points",
        group=variant["name"],
    )


def _curve(variant: Tree, law: str) -> list[Series]:
    """Return a law as tokens; nothing where it could not be fitted."""
    line = variant[law]["curve"]
    if line is None:
        return []

    def tokens(key: str) -> tuple[float, ...]:
        return tuple(b * s for b, s in zip(line["x"], _gaps(line[key]), strict=True))

    return [
        Series(
            name=f"{variant['name']}, law",
            x=tuple(line["x"]),
            y=tokens("y"),
            low=tokens("low"),
            high=tokens("high"),
            group=variant["name"],
        )
    ]


def _gaps(values: Any) -> tuple[float, ...]:
    return tuple(math.nan if value is None else value for value in values)
