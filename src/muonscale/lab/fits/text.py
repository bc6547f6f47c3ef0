"""The findings of fits for a console."""

from __future__ import annotations

import math

from muonscale.lab.console import table_text
from muonscale.lab.fits.findings import Estimate, Findings, Fitted, Ratio, number
from muonscale.lab.fits.leave_out import HeldOut

Row = tuple[str, str, str, str]
"""What, value, interval, remark."""


def text(found: Findings) -> str:
    """Return the findings as aligned lines."""
    blocks = [[heading(found)]]
    blocks += [_fit(fitted, found.rung) for fitted in found.fits]
    blocks += [_ratio(ratio) for ratio in found.ratios]
    blocks += [list(found.notes)] if found.notes else []
    return "\n\n".join("\n".join(block) for block in blocks)


def heading(found: Findings) -> str:
    """Return the law, the table, and what the intervals are."""
    return (
        f"{found.law}, fitted to {found.source}; {100 * found.level:g} % intervals from "
        f"{found.resamples:,} resamples (seed {found.seed})"
    )


def interval(value: Estimate) -> str:
    """Return an interval, or nothing where there is none."""
    return "" if math.isnan(value.low) else f"{number(value.low)} to {number(value.high)}"


def remarks(fitted: Fitted) -> list[str]:
    """Return the sentences that belong to a fit."""
    lines = [fitted.remark] if fitted.remark else []
    if fitted.without_intervals:
        lines.append(f"no intervals: {fitted.without_intervals}")
    if fitted.without_held_out:
        lines.append(f"no rung left out: {fitted.without_held_out}")
    if fitted.failed_resamples:
        lines.append(f"{fitted.failed_resamples:,} resamples did not end at a minimum")
    lines += [
        f"{where(item)} not left out: {item.refused}" for item in fitted.held_out if item.refused
    ]
    return lines


def summary(fitted: Fitted) -> str:
    """Return a line about how a fit went."""
    line = f"{fitted.runs} runs, {fitted.status.value}, residuals {percent(fitted.rms)}"
    line += f" (largest {percent(fitted.largest)})"
    if fitted.seed_noise is not None:
        line += f", seeds alone {percent(fitted.seed_noise)}"
    return line


def where(item: HeldOut) -> str:
    """Return the name of a rung."""
    return number(item.rung)


def percent(value: float) -> str:
    """Return a difference of logarithms in per cent."""
    return "unknown" if math.isnan(value) else f"{100 * value:.3g} %"


def _fit(fitted: Fitted, rung: str) -> list[str]:
    name = f"{fitted.name}: " if fitted.name else ""
    rows = [_row(value) for value in fitted.estimates]
    rows += [
        (
            f"error without {rung} = {where(item)}",
            percent(item.error),
            "",
            _mark(item.extrapolated),
        )
        for item in fitted.held_out
        if item.error is not None
    ]
    lines = [table_text(rows, indent=2)] if rows else []
    return [name + summary(fitted), *lines, *(f"  {line}" for line in remarks(fitted))]


def _ratio(ratio: Ratio) -> list[str]:
    rows = [
        (f"at {value.name}", number(value.value), interval(value), _mark(value.extrapolated))
        for value in ratio.rows
    ]
    return [f"{title(ratio)}, by {ratio.at}", table_text(rows, indent=2)]


def title(ratio: Ratio) -> str:
    """Return what a ratio is."""
    return f"{ratio.first} / {ratio.second}: {ratio.what}"


def _row(value: Estimate) -> Row:
    return value.name, number(value.value), interval(value), _mark(value.extrapolated)


def _mark(extrapolated: bool) -> str:
    return "extrapolated" if extrapolated else ""
