"""The results of fits as text for a console."""

from __future__ import annotations

import math
import statistics

from muonscale.lab.console import table_text
from muonscale.lab.fits.findings import (
    Findings,
    FitEstimate,
    FitRatio,
    Fitted,
    format_ends,
    format_significant,
)
from muonscale.lab.fits.leave_out import LeftOut

Cells = tuple[str, str, str, str]
"""Name, value, interval, remark."""
MOST_RUNGS = 10
"""With more rungs, the console shows the median of their errors and the largest ones."""
WORST_RUNGS = 5


def format_findings(found: Findings) -> str:
    """Return the results as aligned lines."""
    blocks = [[format_heading(found)]]
    for fitted in found.fits:
        name = f"{fitted.name}: " if fitted.name else ""
        rows = [estimate_cells(value) for value in fitted.estimates]
        rows += _format_errors(fitted.left_out, found.rung)
        remarks = [f"  {line}" for line in list_remarks(fitted, WORST_RUNGS)]
        blocks.append([name + format_summary(fitted), table_text(rows, indent=2), *remarks])
    for ratio in found.ratios:
        rows = [estimate_cells(value, "at ") for value in ratio.rows]
        remarks = [f"  {line}" for line in [describe_undetermined(ratio)] if line]
        blocks.append(
            [f"{format_title(ratio)}, by {ratio.at}", table_text(rows, indent=2), *remarks]
        )
    if found.notes:
        blocks.append(list(found.notes))
    return "\n\n".join("\n".join(block) for block in blocks)


def format_heading(found: Findings) -> str:
    """Return the law, the table, and how the intervals were made."""
    return (
        f"{found.law}, fitted to {found.source}; {100 * found.level:g} % intervals from "
        f"{found.resamples:,} resamples (seed {found.seed})"
    )


def format_summary(fitted: Fitted) -> str:
    """Return a line about how a fit went."""
    line = f"{fitted.runs} runs, {fitted.status.value}, residuals {format_percent(fitted.rms)}"
    line += f" (largest {format_percent(fitted.largest)})"
    if fitted.seed_noise is not None:
        line += f", seeds alone {format_percent(fitted.seed_noise)}"
    return line


def estimate_cells(value: FitEstimate, prefix: str = "") -> Cells:
    """Return the cells of an estimate."""
    return (
        prefix + value.name,
        format_significant(value.value),
        format_ends(value.low, value.high),
        mark_extrapolated(value.extrapolated),
    )


def format_title(ratio: FitRatio) -> str:
    """Return what a ratio is."""
    return f"{ratio.first} / {ratio.second}: {ratio.what}"


def describe_undetermined(ratio: FitRatio) -> str:
    """Return why a ratio says nothing; empty if the runs determine both laws."""
    if not ratio.undetermined:
        return ""
    names = " and ".join(ratio.undetermined)
    return f"not a result: the runs do not determine the law of {names}"


def format_percent(value: float) -> str:
    """Return a difference of logarithms in per cent."""
    return "unknown" if math.isnan(value) else f"{100 * value:.3g} %"


def mark_extrapolated(extrapolated: bool) -> str:
    """Return the remark on a number from outside the measured sizes."""
    return "extrapolated" if extrapolated else ""


def list_remarks(fitted: Fitted, most: int | None = None) -> list[str]:
    """Return the sentences that belong to a fit, with at most `most` about rungs."""
    lines = [fitted.remark] if fitted.remark else []
    if fitted.without_intervals:
        lines.append(f"no intervals: {fitted.without_intervals}")
    if fitted.none_left_out:
        lines.append(f"no rung left out: {fitted.none_left_out}")
    if fitted.failed_resamples:
        lines.append(f"{fitted.failed_resamples:,} resamples did not end at a minimum")
    refused = [item for item in fitted.left_out if item.refused]
    lines += [
        f"{format_significant(item.rung)} not left out: {item.refused}" for item in refused[:most]
    ]
    if most is not None and len(refused) > most:
        lines.append(f"{len(refused) - most} more rungs not left out")
    return lines


def _format_errors(left_out: tuple[LeftOut, ...], rung: str) -> list[Cells]:
    """Return the error without each rung; of many rungs the median, the worst and the last."""
    errors = {item: item.error for item in left_out if item.error is not None}
    shown, rows = set(errors), []
    if len(errors) > MOST_RUNGS:
        median = format_percent(statistics.median(errors.values()))
        name = f"error without one {rung}, median of {len(errors)}"
        rows.append((name, median, "", "all with --json or --report"))
        worst = sorted(errors, key=lambda item: errors[item], reverse=True)[:WORST_RUNGS]
        shown = {*worst, left_out[-1]}
    for item, error in errors.items():
        if item in shown:
            name = f"error without {rung} = {format_significant(item.rung)}"
            rows.append((name, format_percent(error), "", mark_extrapolated(item.extrapolated)))
    return rows
