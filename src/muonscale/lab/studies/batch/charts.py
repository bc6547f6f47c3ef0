"""Charts of a batch study: tokens, steps and their ratio by batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from muonscale.lab.fits.bootstrap import CONFIDENCE
from muonscale.lab.report.page import Block, Chart, Mark, Series
from muonscale.lab.studies.report_blocks import Found, interval_series, keep_nonempty

LAWS = {
    "mccandlish": ("S = Smin + Emin/B", "The critical batch size is Emin/Smin."),
    "regimes": ("three regimes", "The critical batch size is where tokens begin to grow."),
}


def ratio_chart(targets: list[Found], baseline: str) -> list[Block]:
    """Return R(B) of all targets."""
    series = [
        _ratio_series(ratio, f"{baseline} / {ratio['other']} to {target['target']:g}")
        for target in targets
        for ratio in target["ratios"]
    ]
    return _draw_ratios("ratio", "Ratio of tokens by batch size", series)


def predicted_chart(target: Found, baseline: str, number: int) -> list[Block]:
    """Return R(B) of one target with the prediction of the three-regime laws."""
    series = []
    for ratio in target["ratios"]:
        name = f"{baseline} / {ratio['other']}"
        series.append(replace(_ratio_series(ratio, name), kind="points"))
        if (line := ratio["predicted"]) is not None:
            title = f"{name}, three regimes"
            points = _curve_points(line)
            series.append(interval_series(title, points, "x", "y", kind="line", group=name))
    return _draw_ratios(f"ratio-{number}", "Ratio of tokens with the predicted one", series)


def _curve_points(line: Found) -> list[Found]:
    columns = ("x", "y", "low", "high")
    values = zip(*(line[key] for key in columns), strict=True)
    return [dict(zip(columns, point, strict=True)) for point in values]


def _ratio_series(ratio: Found, name: str) -> Series:
    rows = [row for row in ratio["rows"] if row["ratio"] is not None and not row["censored"]]
    return interval_series(name, rows, "batch", "ratio", group=name)


def _draw_ratios(name: str, title: str, series: list[Series]) -> list[Block]:
    return keep_nonempty(
        Chart(
            name=name,
            title=title,
            x_label="batch size (tokens)",
            y_label="ratio of tokens to the loss",
            log_x=True,
            series=tuple(series),
            marks=(Mark(axis="y", at=1.0, label="equal"),),
            caption="Above 1 the baseline takes more tokens. Bars and bands are "
            f"{CONFIDENCE:.0%} intervals, "
            "seed by seed.",
        )
    )


def law_charts(target: Found, number: int) -> list[Block]:
    """Return T(B) with each of the two laws, and S(B)."""
    tokens, steps = [], []
    for variant in target["variants"]:
        name = variant["name"]
        places = [place for place in variant["places"] if place["tokens"] is not None]
        tokens.append(interval_series(name, places, "batch", "tokens", kind="points", group=name))
        divided = [_map_values(p, "tokens", lambda t, b=p["batch"]: t / b) for p in places]
        steps.append(interval_series(name, divided, "batch", "tokens", group=name))
    charts = []
    for law, (name, text) in LAWS.items():
        series = []
        for variant, measured in zip(target["variants"], tokens, strict=True):
            series.append(measured)
            if (line := variant[law]["curve"]) is not None:
                points = [
                    _map_values(p, "y", lambda s, b=p["x"]: b * s) for p in _curve_points(line)
                ]
                title, group = f"{variant['name']}, law", variant["name"]
                series.append(interval_series(title, points, "x", "y", kind="line", group=group))
        charts.append(
            _draw_amounts(
                f"tokens-{law}-{number}",
                f"Tokens to a loss of {target['target']:g}, {name}",
                "training tokens to the loss",
                series,
                f"{text} Points are means over seeds at the best learning rate with "
                f"{CONFIDENCE:.0%} "
                "intervals; bands are those of the law.",
            )
        )
    charts.append(
        _draw_amounts(
            f"steps-{number}",
            f"Steps to a loss of {target['target']:g}",
            "optimizer steps to the loss",
            steps,
            "The tokens of the other charts over the batch size.",
        )
    )
    return keep_nonempty(*charts)


def _map_values(point: Found, y: str, change: Callable[[float], float]) -> Found:
    """Return a point with its value and the ends of its interval changed."""
    ends = {
        key: point[key] if point[key] is None else change(point[key]) for key in ("low", "high")
    }
    return {**point, y: change(point[y]), **ends}


def _draw_amounts(name: str, title: str, y_label: str, series: list[Series], caption: str) -> Chart:
    return Chart(
        name=name,
        title=title,
        x_label="batch size (tokens)",
        y_label=y_label,
        log_x=True,
        log_y=True,
        series=tuple(series),
        caption=caption,
    )
