"""The results of fits as a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from muonscale.lab.fits.findings import (
    Findings,
    FitCurve,
    FitRatio,
    Fitted,
    format_significant,
)
from muonscale.lab.fits.result import BoolArray
from muonscale.lab.fits.text import (
    describe_undetermined,
    estimate_cells,
    format_heading,
    format_percent,
    format_summary,
    format_title,
    list_remarks,
    mark_extrapolated,
)
from muonscale.lab.report.page import (
    Block,
    Chart,
    Command,
    LineT,
    Mark,
    Page,
    PageSection,
    Series,
    Table,
    Text,
    Verdict,
)


def fit_page(found: Findings, command: str = "") -> Page:
    """Return a page with the laws, their charts, the errors of rungs left out, and the ratios.

    Args:
        found: results of the fits.
        command: command that makes this page; left out if empty.
    """
    sections = fit_sections(found)
    last: list[Block] = [Text(note) for note in found.notes]
    last += [Command(command)] if command else []
    if last:
        sections.append(PageSection(title="How this was made", blocks=tuple(last)))
    return Page(
        title=f"Fit of {found.law}",
        summary=f"{format_heading(found)}.",
        sections=tuple(sections),
    )


def fit_sections(found: Findings, prefix: str = "", part: str = "") -> list[PageSection]:
    """Return the sections about one fit, for a page about several fits.

    Args:
        found: results of the fit.
        prefix: start of the names of its charts and tables.
        part: heading above its sections.
    """
    sections = [
        PageSection(title="Measured and fitted", blocks=(_draw_fits(found, prefix),), part=part)
    ]
    for place, fitted in enumerate(found.fits, start=1):
        estimates = Table(
            head=("what", "value", "interval", "remark"),
            rows=tuple(map(estimate_cells, fitted.estimates)),
            name=f"{prefix}estimates-{place}",
        )
        blocks: list[Block] = [Text(f"{format_summary(fitted)}."), estimates]
        if fitted.left_out:
            blocks.append(
                Table(
                    head=(found.rung, "runs", "error", "remark"),
                    rows=tuple(
                        (
                            format_significant(item.rung),
                            str(item.points),
                            "" if item.error is None else format_percent(item.error),
                            mark_extrapolated(item.extrapolated),
                        )
                        for item in fitted.left_out
                    ),
                    name=f"{prefix}left-out-{place}",
                    caption=f"Each {found.rung}, and the error on its runs of a law that was "
                    "fitted to all other runs.",
                )
            )
        blocks += [Text(f"{line}.") for line in list_remarks(fitted)]
        sections.append(
            PageSection(title=fitted.name or "The law", blocks=tuple(blocks), part=part)
        )
    for place, ratio in enumerate(found.ratios, start=1):
        table = Table(
            head=(ratio.at, "ratio", "interval", "remark"),
            rows=tuple(map(estimate_cells, ratio.rows)),
            name=f"{prefix}ratios-{place}",
        )
        blocks = [_judge_ratio(ratio)]
        if not ratio.undetermined:
            blocks.append(_draw_ratio(ratio, f"{prefix}ratio-{place}"))
        blocks.append(table)
        sections.append(PageSection(title=format_title(ratio), blocks=tuple(blocks), part=part))
    return sections


def _draw_fits(found: Findings, prefix: str) -> Chart:
    series: list[Series] = []
    undetermined: list[str] = []
    for fitted in found.fits:
        group = fitted.name or "all runs"
        series.append(
            Series(
                name=f"{group}, measured",
                x=fitted.measured_x,
                y=fitted.measured_y,
                kind="points",
                group=group,
            )
        )
        if fitted.curve is None:
            undetermined.append(group)
        else:
            series += _draw_law(fitted, fitted.curve, group)
    caption = f"Bands are {100 * found.level:g} % intervals of the law, not of a run."
    if any(item.kind == "dashed" for item in series):
        caption += " A dashed line is extrapolated."
    if undetermined:
        caption += f" The runs do not determine the law of {' and '.join(undetermined)}: no curve."
    return Chart(
        name=f"{prefix}fit",
        title=found.law,
        x_label=found.x_label,
        y_label=found.y_label,
        series=tuple(series),
        log_x=True,
        log_y=True,
        caption=caption,
    )


def _draw_law(fitted: Fitted, curve: FitCurve, group: str) -> list[Series]:
    """Return a law inside the range of its runs, and dashed on both sides of it."""
    x, banded = np.array(curve.x), not fitted.without_intervals
    low, high = min(fitted.measured_x), max(fitted.measured_x)
    inside = (x >= low) & (x <= high)
    parts: list[tuple[BoolArray, str, LineT]] = [
        (inside, "law", "line"),
        (x <= low, "below its runs", "dashed"),
        (x >= high, "beyond its runs", "dashed"),
    ]

    def pick(values: Sequence[float], part: BoolArray) -> tuple[float, ...]:
        return _drop_infinite(np.array(values)[part].tolist())

    return [
        Series(
            name=f"{group}, {what}",
            x=pick(curve.x, part),
            y=pick(curve.y, part),
            low=pick(curve.low, part) if banded else None,
            high=pick(curve.high, part) if banded else None,
            kind=kind,
            group=group,
        )
        for part, what, kind in parts
        if np.count_nonzero(part) > 1
    ]


def _draw_ratio(ratio: FitRatio, name: str) -> Chart:
    values = Series(
        name=f"{ratio.first} / {ratio.second}",
        x=ratio.places,
        y=_drop_infinite(value.value for value in ratio.rows),
        low=_drop_infinite(value.low for value in ratio.rows),
        high=_drop_infinite(value.high for value in ratio.rows),
        kind="both",
    )
    return Chart(
        name=name,
        title=format_title(ratio),
        x_label=ratio.at,
        y_label="ratio",
        series=(values,),
        marks=(Mark(axis="y", at=1.0, label="equal"),),
        log_x=True,
    )


def _judge_ratio(ratio: FitRatio) -> Verdict:
    """Say whether the ratio is on one side of 1 wherever it was measured."""
    measured = [value for value in ratio.rows if not value.extrapolated]
    if ratio.undetermined:
        text = describe_undetermined(ratio)
        return Verdict(None, f"{text[0].upper()}{text[1:]}.")
    what = f"{ratio.what}: {ratio.first} / {ratio.second}"
    if not measured:
        return Verdict(None, f"{what} was not measured.")
    if all(value.high < 1 for value in measured):
        return Verdict(True, f"{what} is below 1 at every place measured.")
    if all(value.low > 1 for value in measured):
        return Verdict(True, f"{what} is above 1 at every place measured.")
    return Verdict(None, f"{what} is not significantly different from 1 at every place measured.")


def _drop_infinite(values: Iterable[float]) -> tuple[float, ...]:
    """Return values with NaN, a gap, for those that are infinite."""
    return tuple(value if math.isfinite(value) else math.nan for value in values)
