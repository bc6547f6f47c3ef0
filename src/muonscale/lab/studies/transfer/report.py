"""The report of a transfer study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from muonscale.lab.report.page import Block, Chart, Page, Section, Series, Table, Text, Verdict
from muonscale.lab.studies.report_blocks import (
    command_block,
    drawn,
    failures_section,
    versions_section,
)
from muonscale.lab.studies.study import Outcomes

if TYPE_CHECKING:
    from muonscale.lab.studies.transfer.study import TransferConfig

NAMES = {"lr": "learning rate", "wd": "weight decay"}


def transfer_page(config: TransferConfig, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
    """Return the report of what `Transfer.analyse` found."""
    curves = found["curves"]
    widths = ", ".join(map(str, config.widths))
    return Page(
        title=f"Transfer of the {NAMES[config.name]} over widths {config.widths[0]} to {config.widths[-1]}",
        summary=f"Where the {NAMES[config.name]} is best at widths {widths}, by optimizer and convention.",
        sections=(
            _verdicts(config, curves),
            _optima(config, curves),
            *(_curve_section(config, curve) for curve in curves),
            *failures_section(found),
            versions_section(outcomes),
        ),
    )


def _title(curve: Mapping[str, Any]) -> str:
    return f"{curve['variant']}, {curve['convention']}"


def _verdicts(config: TransferConfig, curves: list[Mapping[str, Any]]) -> Section:
    blocks: list[Block] = [command_block(config)]
    for curve in curves:
        says = {True: "transfers", False: "does not transfer", None: "undecided"}[
            curve["transfers"]
        ]
        blocks.append(Verdict(curve["transfers"], f"{_title(curve)}: {says}; {curve['why']}"))
    blocks.append(
        Text(
            f"The {NAMES[config.name]} transfers if its optimum moves less than one step of the grid from "
            "that at the first width, at every width, and is never the lowest or highest value that was "
            "tried. At the first width nothing is multiplied, and all conventions share its runs."
        )
    )
    return Section(title="Verdicts", blocks=tuple(blocks))


def _optima(config: TransferConfig, curves: list[Mapping[str, Any]]) -> Section:
    return Section(
        title="Optimum by width",
        blocks=(
            *drawn(_optimum_chart(config, curves), _best_chart(curves)),
            Table(
                name="optima",
                head=(
                    "optimizer",
                    "convention",
                    "width",
                    "optimum",
                    "interval",
                    "best tried",
                    "edge",
                    "loss",
                ),
                rows=tuple(_row(curve, w) for curve in curves for w in curve["widths"]),
            ),
        ),
    )


def _best_chart(curves: list[Mapping[str, Any]]) -> Chart:
    return Chart(
        name="best-loss",
        title="Best loss by width",
        x_label="width",
        y_label="held-out loss (nats per token)",
        log_x=True,
        series=tuple(
            Series(
                name=_title(curve),
                x=tuple(w["width"] for w in curve["widths"] if w["loss"] is not None),
                y=tuple(w["loss"] for w in curve["widths"] if w["loss"] is not None),
                kind="both",
            )
            for curve in curves
        ),
        caption="Mean over seeds at the best value that was tried.",
    )


def _row(curve: Mapping[str, Any], w: Mapping[str, Any]) -> tuple[str, ...]:
    interval = "-" if w["low"] is None else f"{w['low']:.3g} to {w['high']:.3g}"
    return (
        curve["variant"],
        curve["convention"],
        str(w["width"]),
        "-" if w["optimum"] is None else f"{w['optimum']:.3g}",
        interval,
        "-" if w["best"] is None else f"{w['best']:g}",
        w["edge"] or "",
        "-" if w["loss"] is None else f"{w['loss']:.4f}",
    )


def _optimum_chart(config: TransferConfig, curves: list[Mapping[str, Any]]) -> Chart:
    series = []
    for curve in curves:
        known = [w for w in curve["widths"] if w["optimum"] is not None]
        ends = [(w["low"] or w["optimum"], w["high"] or w["optimum"]) for w in known]
        series.append(
            Series(
                name=_title(curve),
                x=tuple(w["width"] for w in known),
                y=tuple(w["optimum"] for w in known),
                low=tuple(low for low, _ in ends),
                high=tuple(high for _, high in ends),
                kind="both",
            )
        )
    return Chart(
        name="optimum",
        title=f"Best {NAMES[config.name]} by width",
        x_label="width",
        y_label=NAMES[config.name],
        log_x=True,
        log_y=True,
        series=tuple(series),
        caption="As it was before it is multiplied: flat is what transfer promises. Bars are 90 % intervals "
        "from the noise of seeds; points without one are values that were tried, at an edge or beside a "
        "run that diverged.",
    )


def _curve_section(config: TransferConfig, curve: Mapping[str, Any]) -> Section:
    name = f"{curve['variant']}-{curve['convention']}"
    series = []
    for w in curve["widths"]:
        points = [p for p in w["points"] if p["mean"] is not None]
        seeds = [[x for x in p["losses"].values() if x is not None] for p in points]
        series.append(
            Series(
                name=f"width {w['width']}",
                x=tuple(p["value"] for p in points),
                y=tuple(p["mean"] for p in points),
                low=tuple(map(min, seeds)),
                high=tuple(map(max, seeds)),
                kind="both",
            )
        )
    minima = [w for w in curve["widths"] if w["best"] is not None]
    series.append(
        Series(
            name="lowest",
            x=tuple(w["best"] for w in minima),
            y=tuple(w["loss"] for w in minima),
            kind="dashed",
        )
    )
    chart = Chart(
        name=f"curves-{name}",
        title=_title(curve),
        x_label=NAMES[config.name],
        y_label="held-out loss (nats per token)",
        log_x=True,
        series=tuple(series),
        caption="Mean over seeds, bars from the lowest to the highest; the dashed line joins the minima.",
    )
    return Section(title=_title(curve), blocks=tuple(drawn(chart)))
