"""The compute-time frontier in a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from muonscale.lab.report.page import Block, Chart, Section, Series, Table, Text, Verdict
from muonscale.lab.studies.report_blocks import drawn

RULE = (
    "One curve lies inside another if it is faster at every judged count of devices in at least 95 % of "
    "draws of the steps to the loss, all counts in the same draw and the best batch size chosen anew. At a "
    "count where the slower one's best batch size is the smallest or the largest that reached the loss, "
    "one beyond might be faster: its time is an upper bound there, and the count is not judged."
)
EDGES = {"low": "upper bound: smallest batch", "high": "upper bound: largest batch", None: ""}


def frontier_sections(found: Mapping[str, Any]) -> list[Section]:
    """Return the frontier that `frontier_of` found, as JSON holds it: None where a number is not finite."""
    if found["why"]:
        return [Section(title="The compute-time frontier", blocks=(Text(f"{found['why']}."),))]
    blocks: list[Block] = [_verdict(v) for v in found["verdicts"]]
    blocks += [Text(RULE)] * bool(found["verdicts"])
    blocks += drawn(_time_chart(found["curves"]), _cost_chart(found["curves"]))
    blocks += [_curve_table(found["curves"])]
    blocks += [_ratio_table(found)] * bool(found["verdicts"])
    blocks.append(_assumption_table(found))
    return [Section(title="The compute-time frontier", blocks=tuple(blocks))]


def _verdict(v: Mapping[str, Any]) -> Verdict:
    claim = (
        f"to {v['target']:g} nats {v['optimizer']}'s curve lies strictly inside {v['baseline']}'s"
    )
    return Verdict(v["inside"], f"{claim}: {v['why']}")


def _time_chart(curves: list[Mapping[str, Any]]) -> Chart:
    return Chart(
        name="frontier",
        title="Time to a loss by devices",
        x_label="devices",
        y_label="time to the loss (s)",
        log_x=True,
        log_y=True,
        series=tuple(_times(curve) for curve in curves),
        caption="Iso-loss curves: the shortest time over the batch sizes that were measured. Bands hold 90 % of "
        "draws of the steps to the loss.",
    )


def _times(curve: Mapping[str, Any]) -> Series:
    points = [p for p in curve["points"] if p["seconds"] is not None]
    banded = all(p["low"] is not None and p["high"] is not None for p in points)
    return Series(
        name=_name(curve),
        group=curve["optimizer"],
        x=tuple(p["devices"] for p in points),
        y=tuple(p["seconds"] for p in points),
        low=tuple(p["low"] for p in points) if banded else None,
        high=tuple(p["high"] for p in points) if banded else None,
        kind="both",
    )


def _cost_chart(curves: list[Mapping[str, Any]]) -> Chart:
    series = []
    for curve in curves:
        points = [p for p in curve["points"] if p["seconds"] is not None]
        series.append(
            Series(
                name=_name(curve),
                group=curve["optimizer"],
                x=tuple(p["seconds"] for p in points),
                y=tuple(p["device_seconds"] for p in points),
                kind="both",
            )
        )
    return Chart(
        name="frontier-cost",
        title="What less time costs",
        x_label="time to the loss (s)",
        y_label="devices x time (device-seconds)",
        log_x=True,
        log_y=True,
        series=tuple(series),
        caption="The same points; the fewest devices are to the right.",
    )


def _name(curve: Mapping[str, Any]) -> str:
    return f"{curve['optimizer']} to {curve['target']:g}"


def _curve_table(curves: list[Mapping[str, Any]]) -> Table:
    head = ("target", "optimizer", "devices", "batch", "seconds", "interval", "device-seconds")
    rows = tuple(
        (
            f"{curve['target']:g}",
            curve["optimizer"],
            str(p["devices"]),
            "-" if p["batch"] is None else f"{p['batch']:.0f}",
            _number(p["seconds"]),
            _interval(p),
            _number(p["device_seconds"]),
            _remark(p),
        )
        for curve in curves
        for p in curve["points"]
    )
    return Table(
        name="frontier-points",
        head=(*head, "remark"),
        rows=rows,
        caption="Batch is the one with the shortest time, in tokens. No batch size beyond those measured is "
        "looked at.",
    )


def _remark(p: Mapping[str, Any]) -> str:
    if p["seconds"] is None:
        return "no batch that so many devices can take reached the loss"
    slower = "" if p["efficient"] else "not on the frontier: fewer devices are as fast"
    return "; ".join(filter(None, (EDGES[p["edge"]], slower)))


def _ratio_table(found: Mapping[str, Any]) -> Table:
    devices = {c["target"]: [p["devices"] for p in c["points"]] for c in found["curves"]}
    rows = []
    for v in found["verdicts"]:
        names = (f"{v['target']:g}", f"{v['optimizer']} / {v['baseline']}")
        rows += [
            (*names, str(n), _number(r["ratio"]), _interval(r), "yes" if r["judged"] else "no")
            for n, r in zip(devices[v["target"]], v["ratios"], strict=True)
        ]
        rows.append((*names, "mean", _number(v["mean"]["ratio"]), _interval(v["mean"]), ""))
    return Table(
        name="frontier-ratios",
        head=("target", "times of", "devices", "ratio", "interval", "judged"),
        rows=tuple(rows),
        caption="Below 1 the first is faster. The mean is geometric, over log devices, of the times on as many "
        "devices or fewer: the difference of the two hypervolumes in log time and log devices (Zitzler and "
        "Thiele 1999; reference point at twice the most devices) over the width of the range.",
    )


def _assumption_table(found: Mapping[str, Any]) -> Table:
    return Table(
        name="frontier-assumptions",
        head=("assumed", "value", "source"),
        rows=tuple((row["what"], row["value"], row["source"]) for row in found["assumptions"]),
        caption=f"What the seconds of a step are made of: frontier.throughput={found['throughput']}.",
    )


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def _interval(row: Mapping[str, Any]) -> str:
    if row["low"] is None and row["high"] is None:
        return "-"
    return f"{_number(row['low'])} to {_number(row['high'])}"
