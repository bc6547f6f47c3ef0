"""Charts of recorded numbers: all curves of one run, or one curve for each of several runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import numpy as np

from muonscale.lab.report.page import Chart, Mark, Numbers, Series
from muonscale.lab.report.run_data import Record, RunData, UnitT
from muonscale.lab.run_folder import KindT

X_LABELS: dict[UnitT, str] = {
    "tokens": "training tokens",
    "step": "step",
    "time": "{} of training steps",
    "FLOPs": "training FLOPs, forward and backward",
}
"""Labels of the x axis."""

TITLE_SUFFIXES: dict[UnitT, str] = {
    "tokens": "",
    "step": " against steps",
    "time": " against time",
    "FLOPs": " against FLOPs",
}
"""What the title of a chart says of its x axis. A new axis is a name in `run_data.UnitT`, a branch
in `RunData.positions`, and a row here and in `X_LABELS`."""

SMOOTHINGS = {"none": 0, "weak": 320, "medium": 80, "strong": 20}
"""Kinds of smoothing: a moving mean reaches over this part of the records to each side."""

TIME_UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))

SMOOTHED, SHOWN = 20, 600
"""The least records for smoothing a noisy number; the number of points of a long curve. Of a longer
one twice as many faint points are drawn: the least and the largest value between two points."""

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
    faint: bool = False
    """Whether the values before smoothing are drawn too, as faint points instead of a band."""
    look: Literal["line", "both"] = "line"
    log_y: bool = False
    caption: str = ""
    caption_of_several: str = ""
    """Describes the one curve that represents each of several runs."""


def chart_of(measure: Measure, runs: Sequence[RunData], unit: UnitT = "tokens") -> Chart | None:
    """Return the chart of a measure; None if no run has recorded it."""
    scale = time_unit(runs)[1] if unit == "time" else 1.0
    several = len(runs) > 1
    found = [s for run in runs for s in _series_of(measure, run, unit, several, scale)]
    if not found:
        return None
    captions = [measure.caption, measure.caption_of_several if len(runs) > 1 else ""]
    if any(series.low is not None for series in found):
        captions.append(
            "Lines are moving means; bands show the least and the largest value of each window."
        )
    elif any(series.kind == "faint" for series in found):
        captions.append("Lines are moving means, faint points the losses of single steps.")
    elif measure.noisy and any(len(run.of_kind(measure.kind)) >= SMOOTHED for run in runs):
        captions.append("Lines are moving means.")
    return Chart(
        name=measure.name if unit == "tokens" else f"{measure.name}-{unit.lower()}",
        title=measure.title + TITLE_SUFFIXES[unit],
        x_label=X_LABELS[unit].format(time_unit(runs)[0]),
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


def time_unit(runs: Sequence[RunData]) -> tuple[str, float]:
    """Return the unit in which people say how long the longest run is, and its seconds."""
    times = [run.positions(run.of_kind("train"), "time") for run in runs]
    longest = max((float(time[-1]) for time in times if len(time)), default=0.0)
    return next(unit for unit in TIME_UNITS if longest >= 2 * unit[1] or unit[1] == 1)


def _series_of(
    measure: Measure, run: RunData, unit: UnitT, several: bool, scale: float = 1.0
) -> list[Series]:
    """Return the curves of one run, thinned if they are long and smoothed if they are noisy."""
    records = run.of_kind(measure.kind)
    curves = dict(measure.parts(records))
    if several:
        first = next(iter(curves.values()), np.array([]))
        curves = {run.label: first if measure.whole is None else measure.whole(records)}
    x = run.positions(records, unit) / scale
    series = []
    for name, y in curves.items():
        known = np.isfinite(y)
        there = np.isfinite(x)
        if not known.any() or not (known & there).any():
            continue
        if known.mean() <= 0.5:  # a number that is recorded at some steps only has no gaps between
            there &= known
        kept_x, kept_y = x[there], y[there]
        # every n-th point, and the last
        shown = np.arange(0, len(kept_x), max(1, len(kept_x) // SHOWN))
        shown = np.unique(np.append(shown, len(kept_x) - 1)) if len(kept_x) else shown
        low, middle, high = None, kept_y[shown], None
        smoothings: list[tuple[str, Numbers]] = []
        if measure.noisy and len(kept_y) >= SMOOTHED:
            middle = _windows(kept_y, shown, np.mean)
            if measure.faint:
                for kind, part in SMOOTHINGS.items():
                    smoothed = _windows(kept_y, shown, np.mean, part)
                    smoothings.append((kind, tuple(smoothed.round(5).tolist())))
                series.append(_faint(name, kept_x, kept_y))
            elif not several:
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
                smoothings=tuple(smoothings),
                kind="both" if np.count_nonzero(known) < SMOOTHED else measure.look,
            )
        )
    return series


def _faint(name: str, x: np.ndarray, y: np.ndarray) -> Series:
    """Return the values of a curve as faint points; of a long one the extremes of every stretch."""
    there = np.flatnonzero(np.isfinite(y))
    if len(there) > 2 * SHOWN:
        stretches = np.array_split(there, SHOWN)
        there = np.unique(
            [pick for s in stretches for pick in (s[y[s].argmin()], s[y[s].argmax()])]
        )
    values = (tuple(v[there].tolist()) for v in (x, y))
    return Series(
        name=f"{name}, single steps", group=name, kind="faint", x=next(values), y=next(values)
    )


def _windows(
    y: np.ndarray,
    shown: np.ndarray,
    reduce: Callable[[np.ndarray], float],
    part: int = SMOOTHINGS["medium"],
) -> np.ndarray:
    """Reduce the windows of finite values around the shown ones; gaps stay gaps."""
    known = np.isfinite(y)
    values = np.full(len(shown), np.nan)
    there = known[shown]
    places = (np.cumsum(known) - 1)[shown[there]]
    values[there] = smooth(y[known], max(1, len(y) // part) if part else 0, reduce, places)
    return values
