"""The compute-time frontier in a report."""

from __future__ import annotations

from muonscale.lab.fits.bootstrap import CONFIDENCE
from muonscale.lab.report.page import Block, Chart, PageSection, Table, Text, Verdict
from muonscale.lab.studies.report_blocks import (
    Found,
    format_interval,
    format_or_dash,
    interval_series,
    keep_nonempty,
)

RULE = (
    "One curve is inside another if it is faster at every judged number of devices in at least 95 "
    "% of draws of the steps to the loss, with all numbers of devices in the same draw and the "
    "best batch size chosen in each. If the slower one's best batch size is the smallest or the "
    "largest that reached the loss, one beyond it might be faster. Its time is then an upper "
    "bound, and that number of devices is not judged."
)
EDGES = {"low": "upper bound: smallest batch", "high": "upper bound: largest batch", None: ""}
TITLE = "The compute-time frontier"


def report_frontier(found: Found) -> PageSection:
    """Return the frontier that `analyze_frontier` found, as JSON holds it."""
    if found["why"]:
        return PageSection(title=TITLE, blocks=(Text(f"{found['why']}."),))
    times, costs, rows = [], [], []
    for curve in found["curves"]:
        group, name = curve["optimizer"], f"{curve['optimizer']} to {curve['target']:g}"
        points = [p for p in curve["points"] if p["seconds"] is not None]
        banded = all(p["low"] is not None and p["high"] is not None for p in points)
        ends = ("low", "high") if banded else None
        times.append(interval_series(name, points, "devices", "seconds", ends=ends, group=group))
        costs.append(
            interval_series(name, points, "seconds", "device_seconds", ends=None, group=group)
        )
        rows += [
            (
                f"{curve['target']:g}",
                group,
                str(p["devices"]),
                format_or_dash(p["batch"], ".0f"),
                format_or_dash(p["seconds"], ".4g"),
                format_interval(p, ".4g"),
                format_or_dash(p["device_seconds"], ".4g"),
                _remark(p),
            )
            for p in curve["points"]
        ]
    verdicts: list[Block] = [
        Verdict(
            v["inside"],
            f"to {v['target']:g} nats {v['optimizer']}'s curve is strictly inside "
            f"{v['baseline']}'s: {v['why']}",
        )
        for v in found["verdicts"]
    ]
    charts = keep_nonempty(
        Chart(
            name="frontier",
            title="Time to a loss by devices",
            x_label="devices",
            y_label="time to the loss (s)",
            log_x=True,
            log_y=True,
            series=tuple(times),
            caption="Iso-loss curves: the shortest time over the measured batch sizes. Bands hold "
            f"{CONFIDENCE:.0%} of draws of the steps to the loss.",
        ),
        Chart(
            name="frontier-cost",
            title="The cost of less time",
            x_label="time to the loss (s)",
            y_label="devices x time (device-seconds)",
            log_x=True,
            log_y=True,
            series=tuple(costs),
            caption="The same points; the fewest devices are to the right.",
        ),
    )
    table = Table(
        name="frontier-points",
        head=(
            *("target", "optimizer", "devices", "batch", "seconds", "interval"),
            *("device-seconds", "remark"),
        ),
        rows=tuple(rows),
        caption="Batch is the measured one with the shortest time, in tokens.",
    )
    assumptions = Table(
        name="frontier-assumptions",
        head=("assumed", "value", "source"),
        rows=tuple((row["what"], row["value"], row["source"]) for row in found["assumptions"]),
        caption=f"The basis of the seconds of a step: frontier.throughput={found['throughput']}.",
    )
    compared = [Text(RULE)] if verdicts else []
    ratios = [_ratio_table(found)] if verdicts else []
    return PageSection(
        title=TITLE, blocks=(*verdicts, *compared, *charts, table, *ratios, assumptions)
    )


def _remark(p: Found) -> str:
    if p["seconds"] is None:
        return "no batch that these devices can share reached the loss"
    slower = "" if p["efficient"] else "not on the frontier: fewer devices are as fast"
    return "; ".join(filter(None, (EDGES[p["edge"]], slower)))


def _ratio_table(found: Found) -> Table:
    devices = {c["target"]: [p["devices"] for p in c["points"]] for c in found["curves"]}
    rows = []
    for v in found["verdicts"]:
        names = (f"{v['target']:g}", f"{v['optimizer']} / {v['baseline']}")
        each = zip(map(str, devices[v["target"]]), v["ratios"], strict=True)
        for n, r in [*each, ("mean", v["mean"])]:
            judged = {True: "yes", False: "no", None: ""}[r.get("judged")]
            rows.append(
                (*names, n, format_or_dash(r["ratio"], ".4g"), format_interval(r, ".4g"), judged)
            )
    return Table(
        name="frontier-ratios",
        head=("target", "times of", "devices", "ratio", "interval", "judged"),
        rows=tuple(rows),
        caption="Below 1 the first is faster. The mean is geometric, over log devices, of the "
        "times on at most that many devices: the difference of the two hypervolumes in log time "
        "and log devices (Zitzler and Thiele 1999; reference point at twice the most devices) over "
        "the width of the range.",
    )
