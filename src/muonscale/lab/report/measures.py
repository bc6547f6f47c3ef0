"""Numbers that training records, as charts: all curves of one run, or one curve of each of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from muonscale.lab.figures import smooth
from muonscale.lab.report.page import Chart, Mark, Series
from muonscale.lab.report.run_data import KindT, Record, RunData, UnitT

UNITS = {"tokens": "training tokens", "step": "step", "seconds": "seconds of training steps"}
AGAINST = {"tokens": "", "step": " against steps", "seconds": " against time"}

SMOOTHED, SHOWN = 20, 600
"""From how many records on a noisy number is smoothed; about how many points a curve is drawn with."""

Curves = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number in the records of runs."""

    name: str
    title: str
    y_label: str
    parts: Callable[[list[Record]], Curves]
    """Its curves in the records of one run, by name."""
    whole: Callable[[list[Record]], np.ndarray] | None = None
    """The one curve of a run that is shown beside others; the first of `parts` when not given."""
    marks: Callable[[Sequence[RunData]], tuple[Mark, ...]] | None = None
    kind: KindT = "train"
    noisy: bool = False
    """Whether it is smoothed."""
    look: Literal["line", "both"] = "line"
    log_y: bool = False
    caption: str = ""
    caption_of_several: str = ""
    """What one curve for each run is."""


def chart_of(measure: Measure, runs: Sequence[RunData], unit: UnitT = "tokens") -> Chart | None:
    """Return a measure of runs as a chart; None if none of them has recorded it."""
    found = [series for run in runs for series in _series_of(measure, run, unit, len(runs) > 1)]
    if not found:
        return None
    captions = [measure.caption, measure.caption_of_several if len(runs) > 1 else ""]
    if any(series.low is not None for series in found):
        captions.append(
            "Lines are moving means; bands show the least and the largest of each window."
        )
    elif measure.noisy and any(_is_smoothed(measure, run) for run in runs):
        captions.append("Lines are moving means.")
    return Chart(
        name=measure.name if unit == "tokens" else f"{measure.name}-{unit}",
        title=measure.title + AGAINST[unit],
        x_label=UNITS[unit],
        y_label=measure.y_label,
        series=tuple(found),
        marks=() if measure.marks is None else measure.marks(runs),
        log_y=measure.log_y,
        caption=" ".join(filter(None, captions)),
    )


def curve(
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    *,
    group: str = "",
    noisy: bool = False,
    band: bool = True,
    look: Literal["line", "both"] = "line",
) -> Series:
    """Return a curve, thinned if it is long, and smoothed with the range of its windows if asked.

    Args:
        name: of the series.
        x: float64 [n].
        y: float64 [n]; NaN is a gap.
        group: of the series.
        noisy: whether it is smoothed, where there are enough points.
        band: whether the range of the windows is given.
        look: kind of the series.
    """
    low = high = None
    shown = _thinned(len(x))
    ys = y[shown]
    if noisy and len(y) >= SMOOTHED:
        low, ys, high = (_windows(y, shown, of) for of in (np.min, np.mean, np.max))
    return Series(
        name=name,
        x=tuple(x[shown].tolist()),
        y=tuple(ys.tolist()),
        low=tuple(low.tolist()) if band and low is not None else None,
        high=tuple(high.tolist()) if band and high is not None else None,
        kind=look,
        group=group,
    )


def _series_of(measure: Measure, run: RunData, unit: UnitT, several: bool) -> list[Series]:
    records = run.of_kind(measure.kind)
    curves = dict(measure.parts(records))
    if several:
        first = next(iter(curves.values()), np.array([]))
        curves = {run.label: first if measure.whole is None else measure.whole(records)}
    x = run.where(records, unit)
    return [
        _known(name, x, y, measure, several) for name, y in curves.items() if np.isfinite(y).any()
    ]


def _known(name: str, x: np.ndarray, y: np.ndarray, measure: Measure, several: bool) -> Series:
    """Return a curve over the records that have a place, and a value where values are rare."""
    there = np.isfinite(x)
    if (
        np.isfinite(y).mean() <= 0.5
    ):  # recorded in some steps only: no gaps but those of other steps
        there &= np.isfinite(y)
    few = np.count_nonzero(np.isfinite(y)) < SMOOTHED
    look = "both" if few else measure.look
    return curve(name, x[there], y[there], noisy=measure.noisy, band=not several, look=look)


def _is_smoothed(measure: Measure, run: RunData) -> bool:
    return len(run.of_kind(measure.kind)) >= SMOOTHED


def _windows(y: np.ndarray, shown: np.ndarray, of: Callable[[np.ndarray], float]) -> np.ndarray:
    """Return what is taken of the windows of finite values around the shown ones; gaps stay gaps."""
    known = np.isfinite(y)
    values = np.full(len(shown), np.nan)
    there = known[shown]
    places = (np.cumsum(known) - 1)[shown[there]]
    values[there] = smooth(y[known], max(1, len(y) // 80), of, places)
    return values


def _thinned(count: int) -> np.ndarray:
    """Return the numbers of the points that are drawn: every n-th, and the last."""
    every = max(1, count // SHOWN)
    return np.unique(np.append(np.arange(0, count, every), max(count - 1, 0)))[:count]
