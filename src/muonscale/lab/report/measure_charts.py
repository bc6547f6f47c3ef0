"""Charts of recorded numbers: all curves of one run, or one curve for each of several runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import numpy as np

from muonscale.lab.report.page import Chart, Mark, Series
from muonscale.lab.report.run_data import Record, RunData, UnitT
from muonscale.lab.run_folder import KindT

UNITS = {"tokens": "training tokens", "step": "step", "seconds": "seconds of training steps"}
AGAINST = {"tokens": "", "step": " against steps", "seconds": " against time"}

SMOOTHED, SHOWN = 20, 600
"""The least records for smoothing a noisy number; the number of points of a long curve."""

Curves = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Measure:
    """A number in the records of runs."""

    name: str
    title: str
    y_label: str
    parts: Callable[[list[Record]], Curves]
    """Reads its curves from the records of one run, by name."""
    _: KW_ONLY
    whole: Callable[[list[Record]], np.ndarray] | None = None
    """Reads the curve that represents a run among others; by default the first of `parts`."""
    marks: Callable[[Sequence[RunData]], tuple[Mark, ...]] | None = None
    kind: KindT = "train"
    noisy: bool = False
    """Whether the number is smoothed."""
    look: Literal["line", "both"] = "line"
    log_y: bool = False
    caption: str = ""
    caption_of_several: str = ""
    """Describes the one curve that represents each of several runs."""


def chart_of(measure: Measure, runs: Sequence[RunData], unit: UnitT = "tokens") -> Chart | None:
    """Return the chart of a measure; None if no run has recorded it."""
    found = [series for run in runs for series in _series_of(measure, run, unit, len(runs) > 1)]
    if not found:
        return None
    captions = [measure.caption, measure.caption_of_several if len(runs) > 1 else ""]
    if any(series.low is not None for series in found):
        captions.append(
            "Lines are moving means; bands show the least and the largest value of each window."
        )
    elif measure.noisy and any(len(run.of_kind(measure.kind)) >= SMOOTHED for run in runs):
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


def smooth(
    values: np.ndarray,
    reach: int,
    reduce: Callable[[np.ndarray], float] = np.mean,
    at: np.ndarray | None = None,
) -> np.ndarray:
    """Return the mean of every value and its neighbors within `reach`.

    Near the start, where the loss falls fast, the window has as many values on the right as on the
    left, so that its mean is neither early nor late. At the end the window is one-sided.

    Args:
        values: finite, float64 [n].
        reach: the largest number of neighbors on each side.
        reduce: computed of each window instead of its mean, such as its maximum.
        at: indices of the values to smooth, int64 [m]; the default is all.
    """
    wanted = np.arange(len(values)) if at is None else at
    left = np.minimum(wanted, reach)
    return np.array([reduce(values[i - n : i + n + 1]) for i, n in zip(wanted, left, strict=True)])


def _series_of(measure: Measure, run: RunData, unit: UnitT, several: bool) -> list[Series]:
    """Return the curves of one run, thinned if they are long and smoothed if they are noisy."""
    records = run.of_kind(measure.kind)
    curves = dict(measure.parts(records))
    if several:
        first = next(iter(curves.values()), np.array([]))
        curves = {run.label: first if measure.whole is None else measure.whole(records)}
    x = run.positions(records, unit)
    series = []
    for name, y in curves.items():
        known = np.isfinite(y)
        if not known.any():
            continue
        there = np.isfinite(x)
        if known.mean() <= 0.5:  # a number that is recorded at some steps only has no gaps between
            there &= known
        kept_x, kept_y = x[there], y[there]
        # every n-th point, and the last
        shown = np.arange(0, len(kept_x), max(1, len(kept_x) // SHOWN))
        shown = np.unique(np.append(shown, len(kept_x) - 1)) if len(kept_x) else shown
        low, middle, high = None, kept_y[shown], None
        if measure.noisy and len(kept_y) >= SMOOTHED:
            middle = _windows(kept_y, shown, np.mean)
            if not several:
                low, high = (
                    tuple(_windows(kept_y, shown, reduce).tolist()) for reduce in (np.min, np.max)
                )
        series.append(
            Series(
                name=name,
                x=tuple(kept_x[shown].tolist()),
                y=tuple(middle.tolist()),
                low=low,
                high=high,
                kind="both" if np.count_nonzero(known) < SMOOTHED else measure.look,
            )
        )
    return series


def _windows(y: np.ndarray, shown: np.ndarray, reduce: Callable[[np.ndarray], float]) -> np.ndarray:
    """Reduce the windows of finite values around the shown ones; gaps stay gaps."""
    known = np.isfinite(y)
    values = np.full(len(shown), np.nan)
    there = known[shown]
    places = (np.cumsum(known) - 1)[shown[there]]
    values[there] = smooth(y[known], max(1, len(y) // 80), reduce, places)
    return values
