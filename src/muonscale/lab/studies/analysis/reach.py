"""What runs spend until they have a loss: steps, tokens, FLOPs, seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from muonscale.lab.fits.crossing import CensoredT, find_crossing
from muonscale.lab.fits.statistics import student_quantile
from muonscale.lab.studies.analysis.curves import MEASURES, LossCurve, average_curves, read_curve
from muonscale.lab.studies.study import Outcome


@dataclass(frozen=True)
class Reach:
    """The amount spent until a curve met a loss, or a bound on it."""

    amount: float
    """The bound if `censored`; NaN if it was not counted."""
    censored: CensoredT
    """`>`: the whole run did not reach the loss; `<`: the loss was lower at the first
    evaluation."""
    end: float
    """The amount that the whole run spent."""
    ratio: float = math.nan
    """Geometric mean over seeds of the amount over that of the baseline's whole run, each seed to
    the baseline's loss with that seed; NaN if a seed is censored."""
    low: float = math.nan
    high: float = math.nan
    """Ends of its 90 % interval; NaN with one seed."""


def reach(runs: Mapping[str, list[Outcome]], baseline: str) -> dict[str, dict[str, Reach]]:
    """Return what each variant spends until it has the final loss of a baseline.

    The amount is that of the mean curve over seeds. The ratio is taken seed by seed, since runs of
    one seed share initial weights, order of the data and validation split.

    Args:
        runs: the compared runs by variant, one for each seed; those that did not finish are left
            out.
        baseline: one of the variants, whose runs have all finished.
    """
    curves = {
        name: {
            int(run.run.coordinates["seed"]): read_curve(run)
            for run in each
            if math.isfinite(run.loss)
        }
        for name, each in runs.items()
    }
    base = curves[baseline]
    target = float(np.mean([curve.loss[-1] for curve in base.values()]))
    found = {}
    for name, each in curves.items():
        if each:
            mean = average_curves(list(each.values()))
            shared = [(curve, base[seed]) for seed, curve in each.items() if seed in base]
            found[name] = {
                measure: _with_ratio(reach_on_curve(mean, measure, target), measure, shared)
                for measure in MEASURES
            }
    return found


def _with_ratio(found: Reach, measure: str, pairs: Sequence[tuple[LossCurve, LossCurve]]) -> Reach:
    """Return what was found with the ratio over pairs of a curve and the baseline's of its seed."""
    each = [(reach_on_curve(own, measure, float(base.loss[-1])), base) for own, base in pairs]
    if not each or any(r.censored or math.isnan(r.amount) for r, _ in each):
        return found
    logs = [math.log(r.amount / base.spent[measure][-1]) for r, base in each]
    return Reach(found.amount, found.censored, found.end, *geometric_mean(logs))


def geometric_mean(logs: Sequence[float]) -> tuple[float, float, float]:
    """Return exp of the mean of logarithms, and the ends of its 90 % interval (NaN for one)."""
    mean = float(np.mean(logs))
    if len(logs) < 2:
        return math.exp(mean), math.nan, math.nan
    half = student_quantile(len(logs) - 1) * float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def reach_on_curve(curve: LossCurve, measure: str, target: float) -> Reach:
    """Return what a curve spent, in one of `MEASURES`, until it met a loss."""
    spent = curve.spent[measure]
    end = float(spent[-1])
    if math.isnan(end):
        return Reach(math.nan, "", end)
    if len(spent) == 1:  # without evaluations on the way, only the end is known
        below = bool(curve.loss[-1] <= target)
        return Reach(end, "<" if below else ">", end)
    crossing = find_crossing(target, spent, curve.loss)
    return Reach(crossing.amount, crossing.censored, end)
