"""Tokens and FLOPs to equal loss between whole runs of several lengths.

A point on the way of a long run has a learning rate that is still high, so its loss is above that
of a run which ends there. Runs of several lengths, each with the schedule of its own length, have
no such handicap: the loss over their lengths is interpolated (see `muonscale.lab.fits.crossing`),
and the amount at which one optimizer has another's final loss is read from it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from muonscale.lab.fits.crossing import find_crossing
from muonscale.lab.studies.analysis.curves import LossCurve, read_curve
from muonscale.lab.studies.analysis.reach import geometric_mean
from muonscale.lab.studies.compare.analysis import ComparedRuns
from muonscale.lab.studies.compare.config import LENGTH
from muonscale.lab.studies.planned_run import Coordinate

MEASURED = ("tokens", "flops")


@dataclass(frozen=True)
class LengthRow:
    """What a variant spends to have a baseline's final loss, by runs that end there."""

    place: dict[str, Coordinate]
    """Of the baseline's runs."""
    variant: str
    baseline: str
    measure: str
    """One of `MEASURED`."""
    ratio: float
    """Amount over the baseline's, the geometric mean over seeds; NaN if `censored`."""
    low: float
    high: float
    """Ends of its 90 % interval; NaN with one seed."""
    censored: str
    """`<` if its shortest run has a lower loss already, `>` if its longest has a higher one, with
    one seed or more; `<>` if seeds differ."""
    tuned: bool
    """Whether all runs that the ratio rests on are tuned."""


def analyze_lengths(
    places: Iterable[tuple[Mapping[str, Coordinate], Mapping[str, ComparedRuns]]],
    baselines: list[str],
) -> list[LengthRow]:
    """Return the ratios at every place with a length, if there are several lengths."""
    series: dict[tuple[tuple[str, Coordinate], ...], list[tuple[float, Mapping[str, ComparedRuns]]]]
    series = defaultdict(list)
    for place, runs in places:
        if LENGTH in place:
            others = tuple(item for item in place.items() if item[0] != LENGTH)
            series[others].append((float(place[LENGTH]), runs))
    rows = []
    for others, lengths in series.items():
        lengths = sorted(lengths, key=lambda item: item[0])
        if len(lengths) < 2:
            continue
        ends = {name: _ends(lengths, name) for name in lengths[0][1]}
        for base in baselines:
            for variant in ends:
                if variant != base:
                    tuned = all(
                        runs[name].search.tuned for _, runs in lengths for name in (variant, base)
                    )
                    for measure in MEASURED:
                        for length, own in _ratios(ends[variant], ends[base], measure).items():
                            place = {**dict(others), LENGTH: length}
                            rows.append(LengthRow(place, variant, base, measure, *own, tuned))
    return rows


def _ends(
    lengths: list[tuple[float, Mapping[str, ComparedRuns]]], variant: str
) -> dict[int, dict[float, LossCurve]]:
    """Return the curves of a variant by seed and length."""
    found: dict[int, dict[float, LossCurve]] = defaultdict(dict)
    for length, runs in lengths:
        for run in runs[variant].at_best:
            if math.isfinite(run.loss):
                found[int(run.run.coordinates["seed"])][length] = read_curve(run)
    return found


def _ratios(
    variant: Mapping[int, Mapping[float, LossCurve]],
    baseline: Mapping[int, Mapping[float, LossCurve]],
    measure: str,
) -> dict[float, tuple[float, float, float, str]]:
    """Return ratio, ends of its interval and censoring by length of the baseline."""
    logs: dict[float, list[float]] = defaultdict(list)
    censored: dict[float, set[str]] = defaultdict(set)
    for seed in variant.keys() & baseline.keys():
        own = [variant[seed][length] for length in sorted(variant[seed])]
        if len(own) < 2:
            continue
        amounts, losses = [c.spent[measure][-1] for c in own], [c.loss[-1] for c in own]
        for length, curve in baseline[seed].items():
            if math.isnan(curve.spent[measure][-1]):
                continue
            found = find_crossing(float(curve.loss[-1]), amounts, losses)
            censored[length].add(found.censored)
            logs[length].append(math.log(found.amount / curve.spent[measure][-1]))
    nothing = (math.nan, math.nan, math.nan)
    return {
        length: (*geometric_mean(logs[length]), "")
        if sides == {""}
        else (*nothing, "".join(sorted(sides)))
        for length, sides in sorted(censored.items())
    }
