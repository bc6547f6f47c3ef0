"""What both renderers share: the drawable part of a chart, the range of an axis, and its ticks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from matplotlib.ticker import MaxNLocator

from muonscale.lab.report.page import Chart, Mark, Numbers, Series, Surface

AxisT = Literal["x", "y"]

MARGIN, MARK_MARGIN = 0.04, 0.08
"""Free space at both ends of an axis, as a part of it; more where the label of a mark needs it."""

OWN_TICKS = 9
"""A logarithmic axis with at most this many different values has its ticks at them."""

TICK_DISTANCE = 0.04
"""Least distance of these ticks, as a part of the axis."""

LARGEST = 1e15
"""Numbers from here on, such as FLOPs, are written as powers of ten."""

UNITS = (1e12, 1e9, 1e6, 1e3)


@dataclass(frozen=True)
class Axis:
    """The visible range of an axis, and its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]


def axis_label(label: str, log: bool) -> str:
    """Return the label of an axis, which names a logarithmic one."""
    return f"{label}, log scale" if log and label else label


def is_flops(label: str) -> bool:
    """Return whether an axis shows FLOPs, which are counted in G and not in B."""
    return "FLOP" in label


def number_text(value: float, digits: int = 4, letters: str = "TBMk") -> str:
    """Return a number as ticks show it: 0.005, 2000, 16k, 1.5M, 2e-05, 1e+18."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= LARGEST:
        return f"{value:.{digits}g}"
    for unit, letter in zip(UNITS, letters, strict=True) if abs(value) >= 1e4 else ():
        if abs(value) >= unit:
            return f"{value / unit:.{digits}g}{letter}"
    return f"{value:.{max(digits, 4)}g}"


def tick_texts(ticks: Sequence[float], label: str = "") -> list[str]:
    """Return ticks of an axis as text with as few digits as make them different."""
    letters = "TGMk" if is_flops(label) else "TBMk"
    for digits in range(3, 16):
        texts = [number_text(tick, digits, letters) for tick in ticks]
        if len(set(texts)) == len(set(ticks)):
            return texts
    return [number_text(tick, 16, letters) for tick in ticks]


def drawable(chart: Chart) -> tuple[Chart, str]:
    """Return the part of a chart that can be drawn, and a sentence about what was left out.

    Values that are not finite become gaps, and so do values of 0 or less on a logarithmic axis. An
    interval that reaches 0 there ends at half of the least value above 0.
    """
    dropped: list[float] = []

    def keep(value: float, log: bool) -> float:
        if math.isfinite(value) and log and value <= 0:
            dropped.append(value)
            return math.nan
        return value if math.isfinite(value) else math.nan

    positive = [v for s in chart.series for v in (*s.y, *(s.low or ())) if 0 < v < math.inf]
    floor = min(positive) / 2 if chart.log_y and positive else -math.inf

    def clean(series: Series) -> Series:
        def end(values: Numbers | None) -> Numbers | None:
            if series.low is None or series.high is None or values is None:
                return values
            return tuple(max(v, floor) if math.isfinite(v) else math.nan for v in values)

        x = tuple(keep(value, chart.log_x) for value in series.x)
        y = tuple(keep(value, chart.log_y) for value in series.y)
        return replace(series, x=x, y=y, low=end(series.low), high=end(series.high))

    def fits(mark: Mark) -> bool:
        return not math.isnan(keep(mark.at, chart.log_x if mark.axis == "x" else chart.log_y))

    cleaned = replace(
        chart,
        series=tuple(map(clean, chart.series)),
        marks=tuple(mark for mark in chart.marks if fits(mark)),
        surface=chart.surface and _drawable_surface(chart.surface, chart, dropped),
    )
    if not dropped:
        return cleaned, ""
    which = "1 value is" if len(dropped) == 1 else f"{len(dropped)} values are"
    return cleaned, f"{which} left out: not above 0 on a logarithmic axis."


def axis_of(chart: Chart, which: AxisT) -> Axis | None:
    """Return an axis of a chart that `drawable` returned; None if it has no values."""
    if chart.bars and which == "x":
        return Axis(-0.7, len(chart.bars) - 0.3, tuple(map(float, range(len(chart.bars)))))
    log = chart.log_x if which == "x" else chart.log_y
    values = [value for value in _axis_values(chart, which) if math.isfinite(value)]
    if not values:
        return None
    marked = chart.bars or any(mark.axis == which for mark in chart.marks)
    margin = MARK_MARGIN if marked else MARGIN
    low, high = _widen(min(values), max(values), log, margin)
    if which == "y" and chart.y_limits is not None:
        low, high = chart.y_limits
    return Axis(low, high, _ticks(low, high, values if which == "x" else [], log))


def minimum_of(surface: Surface) -> tuple[float, float, float] | None:
    """Return x, y and z of the smallest value of a surface; None if it has no values."""
    points = [
        (z, x, y)
        for y, row in zip(surface.y, surface.z, strict=True)
        for x, z in zip(surface.x, row, strict=True)
        if not math.isnan(z)
    ]
    if not points:
        return None
    z, x, y = min(points)
    return x, y, z


def has_markers(series: Series) -> bool:
    """Return whether points are marked, by kind or because a lone point needs it."""
    if series.kind == "faint":
        return True
    known = [not math.isnan(x + y) for x, y in zip(series.x, series.y, strict=True)]
    alone = not any(a and b for a, b in itertools.pairwise(known))
    return series.kind in ("points", "both") or alone


def _drawable_surface(surface: Surface, chart: Chart, dropped: list[float]) -> Surface | None:
    """Return a surface without rows and columns of 0 or less on a logarithmic axis.

    None if too little is left for contours.
    """
    rows = [n for n, y in enumerate(surface.y) if not chart.log_y or y > 0]
    columns = [n for n, x in enumerate(surface.x) if not chart.log_x or x > 0]
    dropped += [y for n, y in enumerate(surface.y) if n not in rows]
    dropped += [x for n, x in enumerate(surface.x) if n not in columns]
    z = tuple(
        tuple(v if math.isfinite(v) else math.nan for v in (surface.z[row][c] for c in columns))
        for row in rows
    )
    x, y = tuple(surface.x[n] for n in columns), tuple(surface.y[n] for n in rows)
    if len(x) < 2 or len(y) < 2 or all(math.isnan(v) for row in z for v in row):
        return None
    return replace(surface, x=x, y=y, z=z)


def _axis_values(chart: Chart, which: AxisT) -> Iterable[float]:
    """Yield every value that an axis must include; the x of a point without a y is not one."""
    if chart.bars:
        yield 0.0
        yield from (sum(stack, 0.0) for stack in zip(*(s.y for s in chart.series), strict=True))
    for series in () if chart.bars else chart.series:
        ends = zip(series.low or series.y, series.high or series.y, strict=True)
        for x, y, (low, high) in zip(series.x, series.y, ends, strict=True):
            if not math.isnan(x) and not math.isnan(y):
                yield from (x,) if which == "x" else (y, low, high)
    if chart.surface is not None:
        yield from chart.surface.x if which == "x" else chart.surface.y
    yield from (mark.at for mark in chart.marks if mark.axis == which)


def _widen(low: float, high: float, log: bool, part: float) -> tuple[float, float]:
    """Return limits with some space around the values."""
    if low == high:
        return (low / 2, low * 2) if log else (low - (abs(low) / 2 or 1), low + (abs(low) / 2 or 1))
    if log:
        factor = (high / low) ** part
        return low / factor, high * factor
    margin = part * (high - low)
    # An axis that begins at 0, such as that of tokens, has nothing to the left of it.
    return (low if low == 0 else low - margin), high + margin


def _ticks(low: float, high: float, values: Iterable[float], log: bool) -> tuple[float, ...]:
    if not log:
        return _round_ticks(low, high)
    own = sorted(set(values))
    least = (high / low) ** TICK_DISTANCE
    if 2 <= len(own) <= OWN_TICKS and all(b / a >= least for a, b in itertools.pairwise(own)):
        return tuple(own)
    # The powers of ten, then also 3, or 2 and 5 times them: the first choice with four ticks.
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil(len(powers) / 9))
    choices = [
        [10.0**power for power in powers if power % every == 0],
        [factor * 10.0**power for power in powers for factor in (1, 3)],
        [factor * 10.0**power for power in powers for factor in (1, 2, 5)],
    ]
    visible = [tuple(t for t in choice if low <= t <= high) for choice in choices]
    ticks = next((ticks for ticks in visible if len(ticks) >= 4), visible[-1])
    return ticks if len(ticks) >= 3 else _round_ticks(low, high)


def _round_ticks(low: float, high: float) -> tuple[float, ...]:
    locator = MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10])
    return tuple(float(t) for t in locator.tick_values(low, high) if low <= t <= high)
