"""The results of fits as a page."""

from __future__ import annotations

import math
from collections.abc import Iterable

from muonscale.lab.fits.findings import Findings, FitRatio, format_significant
from muonscale.lab.fits.text import (
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
        chart = _draw_ratio(ratio, f"{prefix}ratio-{place}")
        blocks = [_judge_ratio(ratio), chart, table]
        sections.append(PageSection(title=format_title(ratio), blocks=tuple(blocks), part=part))
    return sections


def _draw_fits(found: Findings, prefix: str) -> Chart:
    series: list[Series] = []
    for fitted in found.fits:
        group, line = fitted.name or "all runs", fitted.curve
        banded = not fitted.without_intervals
        series += [
            Series(
                name=f"{group}, measured",
                x=fitted.measured_x,
                y=fitted.measured_y,
                kind="points",
                group=group,
            ),
            Series(
                name=f"{group}, law",
                x=line.x,
                y=line.y,
                low=_drop_infinite(line.low) if banded else None,
                high=_drop_infinite(line.high) if banded else None,
                group=group,
            ),
        ]
    return Chart(
        name=f"{prefix}fit",
        title=found.law,
        x_label=found.x_label,
        y_label=found.y_label,
        series=tuple(series),
        log_x=True,
        log_y=True,
        caption=f"Bands are {100 * found.level:g} % intervals of the law, not of a run.",
    )


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
