"""What the two kinds of drawing share: what of a chart can be drawn, its axes, and their ticks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from matplotlib.ticker import MaxNLocator

from muonscale.lab.report.page import Chart, Mark, Series, Surface

AxisT = Literal["x", "y"]

MARGIN, MARK_MARGIN = 0.04, 0.08
"""Free space at both ends of an axis, as a part of it: else, and where a label of a mark needs it."""

OWN_TICKS = 9
"""Up to so many different values of a logarithmic axis are its ticks."""

APART = 0.04
"""Least distance of these ticks, as a part of the axis."""

LARGEST = 1e15
"""From where on numbers, such as operations, are written as powers of ten."""

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Axis:
    """What is seen of an axis, in values, and where its ticks are."""

    low: float
    high: float
    ticks: tuple[float, ...]


def number_text(value: float, digits: int = 4) -> str:
    """Return a number as ticks show it: 0.005, 2000, 16k, 1.5M, 2e-05, 1e+18."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= LARGEST:
        return f"{value:.{digits}g}"
    for unit, letter in UNITS if abs(value) >= 1e4 else ():
        if abs(value) >= unit:
            return f"{value / unit:.{digits}g}{letter}"
    return f"{value:.{max(digits, 4)}g}"


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Return ticks as text with as many digits as tell them apart."""
    for digits in range(3, 16):
        texts = [number_text(tick, digits) for tick in ticks]
        if len(set(texts)) == len(set(ticks)):
            return texts
    return [number_text(tick, 16) for tick in ticks]


def drawable(chart: Chart) -> tuple[Chart, str]:
    """Return what of a chart can be drawn, and sentences about what cannot.

    Values that are not finite become gaps, and so do those on a logarithmic axis that are not above
    0. An interval that reaches 0 there ends at half of the least value above it.
    """
    dropped: list[float] = []

    def allowed(value: float, log: bool) -> float:
        if math.isfinite(value) and log and value <= 0:
            dropped.append(value)
            return math.nan
        return value if math.isfinite(value) else math.nan

    floor = _floor(chart) if chart.log_y else -math.inf

    def clean(series: Series) -> Series:
        x = tuple(allowed(value, chart.log_x) for value in series.x)
        y = tuple(allowed(value, chart.log_y) for value in series.y)
        if series.low is None or series.high is None:
            return replace(series, x=x, y=y)
        low, high = (tuple(_above(v, floor) for v in ends) for ends in (series.low, series.high))
        return replace(series, x=x, y=y, low=low, high=high)

    def fits(mark: Mark) -> bool:
        return not math.isnan(allowed(mark.at, chart.log_x if mark.axis == "x" else chart.log_y))

    cleaned = replace(
        chart,
        series=tuple(map(clean, chart.series)),
        marks=tuple(mark for mark in chart.marks if fits(mark)),
        surface=chart.surface and _surface(chart.surface, chart.log_x, chart.log_y, dropped),
    )
    return cleaned, _sentence(len(dropped))


def axis_of(chart: Chart, which: AxisT) -> Axis | None:
    """Return an axis of a chart that `drawable` returned; None if nothing is on it."""
    log = chart.log_x if which == "x" else chart.log_y
    values = [value for value in _values(chart, which) if math.isfinite(value)]
    if not values:
        return None
    margin = MARK_MARGIN if any(mark.axis == which for mark in chart.marks) else MARGIN
    low, high = _widened(min(values), max(values), log, margin)
    if which == "y" and chart.y_limits is not None:
        low, high = chart.y_limits
    return Axis(low, high, _ticks(low, high, values if which == "x" else [], log))


def smallest(surface: Surface) -> tuple[float, float, float] | None:
    """Return x, y and z of the smallest value of a surface; None if none is known."""
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
    """Return whether the points of a series are marked: asked for, or nothing else would be seen."""
    known = [not math.isnan(x + y) for x, y in zip(series.x, series.y, strict=True)]
    alone = not any(a and b for a, b in itertools.pairwise(known))
    return series.kind in ("points", "both") or alone


def _above(value: float, floor: float) -> float:
    return max(value, floor) if math.isfinite(value) else math.nan


def _floor(chart: Chart) -> float:
    """Return where intervals that reach 0 end on a logarithmic axis."""
    values = [v for s in chart.series for v in (*s.y, *(s.low or ())) if 0 < v < math.inf]
    return min(values) / 2 if values else -math.inf


def _surface(surface: Surface, log_x: bool, log_y: bool, dropped: list[float]) -> Surface | None:
    """Return a surface without the rows and columns that a logarithmic axis cannot have.

    None if too little is left for contours.
    """
    rows = [n for n, y in enumerate(surface.y) if not log_y or y > 0]
    columns = [n for n, x in enumerate(surface.x) if not log_x or x > 0]
    dropped += [y for y in surface.y if log_y and y <= 0]
    dropped += [x for x in surface.x if log_x and x <= 0]
    z = tuple(
        tuple(v if math.isfinite(v) else math.nan for v in (surface.z[row][c] for c in columns))
        for row in rows
    )
    x, y = tuple(surface.x[n] for n in columns), tuple(surface.y[n] for n in rows)
    if len(x) < 2 or len(y) < 2 or all(math.isnan(v) for row in z for v in row):
        return None
    return replace(surface, x=x, y=y, z=z)


def _sentence(dropped: int) -> str:
    if dropped == 0:
        return ""
    which = "1 value is" if dropped == 1 else f"{dropped} values are"
    return f"{which} not above 0 and left out, the axis being logarithmic."


def _values(chart: Chart, which: AxisT) -> Iterable[float]:
    """Return all that has to be seen on an axis: no x of a point without a y."""
    for series in chart.series:
        ends = zip(series.low or series.y, series.high or series.y, strict=True)
        for x, y, (low, high) in zip(series.x, series.y, ends, strict=True):
            if not math.isnan(x) and not math.isnan(y):
                yield from (x,) if which == "x" else (y, low, high)
    if chart.surface is not None:
        yield from chart.surface.x if which == "x" else chart.surface.y
    yield from (mark.at for mark in chart.marks if mark.axis == which)


def _widened(low: float, high: float, log: bool, part: float) -> tuple[float, float]:
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
    least = (high / low) ** APART
    if 2 <= len(own) <= OWN_TICKS and all(b / a >= least for a, b in itertools.pairwise(own)):
        return tuple(own)
    return _log_ticks(low, high)


def _round_ticks(low: float, high: float) -> tuple[float, ...]:
    locator = MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10])
    return tuple(float(t) for t in locator.tick_values(low, high) if low <= t <= high)


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return ticks at 1, 2 and 5 of every power of ten; fewer, or round steps, as the axis needs."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil(len(powers) / 9))
    choices: list[Callable[[int], list[float]]] = [
        lambda power: [10.0**power] if power % every == 0 else [],
        lambda power: [10.0**power, 3 * 10.0**power],
        lambda power: [10.0**power, 2 * 10.0**power, 5 * 10.0**power],
    ]
    found = [
        tuple(t for power in powers for t in choice(power) if low <= t <= high)
        for choice in choices
    ]
    many = next((ticks for ticks in found if len(ticks) >= 4), found[-1])
    return many if len(many) >= 3 else _round_ticks(low, high)
