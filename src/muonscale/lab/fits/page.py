"""The findings of fits as a page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from muonscale.lab.fits.findings import Findings, Fitted, Ratio, number
from muonscale.lab.fits.text import heading, interval, percent, remarks, summary, title, where
from muonscale.lab.report.page import (
    Block,
    Chart,
    Command,
    Mark,
    Page,
    Section,
    Series,
    Table,
    Text,
    Verdict,
)


def fit_page(found: Findings, command: str = "") -> Page:
    """Return a page with the laws, their charts, what was held out, and the groups compared.

    Args:
        found: what the fits say.
        command: what to type to get this page; left out when empty.
    """
    sections = fit_sections(found)
    last: list[Block] = [Text(note) for note in found.notes]
    last += [Command(command)] if command else []
    if last:
        sections.append(Section(title="How this was made", blocks=tuple(last)))
    return Page(title=f"Fit of {found.law}", summary=f"{heading(found)}.", sections=tuple(sections))


def fit_sections(found: Findings, prefix: str = "", part: str = "") -> list[Section]:
    """Return the sections of a page about several fits that one fit has.

    Args:
        found: what the fit says.
        prefix: of the names of its charts and tables.
        part: heading above its sections.
    """
    first = Section(title="Measured and fitted", blocks=(_chart(found),))
    fits = [_fit(fitted, place, found) for place, fitted in enumerate(found.fits)]
    ratios = [_ratio(ratio, place) for place, ratio in enumerate(found.ratios)]
    return [_renamed(section, prefix, part) for section in (first, *fits, *ratios)]


def _renamed(section: Section, prefix: str, part: str) -> Section:
    named = (Chart, Table)
    blocks = tuple(
        replace(block, name=f"{prefix}{block.name}") if isinstance(block, named) else block
        for block in section.blocks
    )
    return replace(section, blocks=blocks, part=part)


def _chart(found: Findings) -> Chart:
    series: list[Series] = []
    for fitted in found.fits:
        group = fitted.name or "all runs"
        line = fitted.curve
        series.append(
            Series(
                name=f"{group}, measured",
                x=fitted.measured_x,
                y=fitted.measured_y,
                kind="points",
                group=group,
            )
        )
        banded = not fitted.without_intervals
        series.append(
            Series(
                name=f"{group}, law",
                x=line.x,
                y=line.y,
                low=_gaps(line.low) if banded else None,
                high=_gaps(line.high) if banded else None,
                group=group,
            )
        )
    return Chart(
        name="fit",
        title=found.law,
        x_label=found.x_label,
        y_label=found.y_label,
        series=tuple(series),
        log_x=True,
        log_y=True,
        caption=f"Bands are {100 * found.level:g} % intervals of the law, not of a run.",
    )


def _fit(fitted: Fitted, place: int, found: Findings) -> Section:
    blocks: list[Block] = [Text(f"{summary(fitted)}."), _estimates(fitted, place)]
    if fitted.held_out:
        blocks.append(_held_out(fitted, place, found.rung))
    blocks += [Text(f"{line}.") for line in remarks(fitted)]
    return Section(title=fitted.name or "The law", blocks=tuple(blocks))


def _estimates(fitted: Fitted, place: int) -> Table:
    rows = tuple(
        (value.name, number(value.value), interval(value), _mark(value.extrapolated))
        for value in fitted.estimates
    )
    head = ("what", "value", "interval", "remark")
    return Table(head=head, rows=rows, name=f"estimates-{place + 1}")


def _held_out(fitted: Fitted, place: int, rung: str) -> Table:
    rows = tuple(
        (
            where(item),
            str(item.points),
            "" if item.error is None else percent(item.error),
            _mark(item.extrapolated),
        )
        for item in fitted.held_out
    )
    return Table(
        head=(rung, "runs", "error", "remark"),
        rows=rows,
        name=f"held-out-{place + 1}",
        caption=f"Error of what a law fitted without the runs of one {rung} says of them.",
    )


def _ratio(ratio: Ratio, place: int) -> Section:
    rows = tuple(
        (value.name, number(value.value), interval(value), _mark(value.extrapolated))
        for value in ratio.rows
    )
    table = Table(
        head=(ratio.at, "ratio", "interval", "remark"), rows=rows, name=f"ratios-{place + 1}"
    )
    return Section(title=title(ratio), blocks=(_verdict(ratio), _ratio_chart(ratio, place), table))


def _ratio_chart(ratio: Ratio, place: int) -> Chart:
    values = Series(
        name=f"{ratio.first} / {ratio.second}",
        x=ratio.places,
        y=_gaps(value.value for value in ratio.rows),
        low=_gaps(value.low for value in ratio.rows),
        high=_gaps(value.high for value in ratio.rows),
        kind="both",
    )
    return Chart(
        name=f"ratio-{place + 1}",
        title=title(ratio),
        x_label=ratio.at,
        y_label="ratio",
        series=(values,),
        marks=(Mark(axis="y", at=1.0, label="equal"),),
        log_x=True,
    )


def _verdict(ratio: Ratio) -> Verdict:
    """Say whether the ratio lies on one side of 1 wherever it was measured."""
    measured = [value for value in ratio.rows if not value.extrapolated]
    what = f"{ratio.what}: {ratio.first} / {ratio.second}"
    if not measured:
        return Verdict(None, f"{what} was measured at no place.")
    if all(value.high < 1 for value in measured):
        return Verdict(True, f"{what} is below 1 at every place measured.")
    if all(value.low > 1 for value in measured):
        return Verdict(True, f"{what} is above 1 at every place measured.")
    return Verdict(None, f"{what} is not told apart from 1 at every place measured.")


def _gaps(values: Iterable[float]) -> tuple[float, ...]:
    """Return values of which those without end are gaps."""
    return tuple(value if math.isfinite(value) else math.nan for value in values)


def _mark(extrapolated: bool) -> str:
    return "extrapolated" if extrapolated else ""
