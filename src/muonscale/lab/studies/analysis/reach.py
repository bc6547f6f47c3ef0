"""What runs spend until they have a loss: steps, tokens, FLOPs, seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from muonscale.lab.fits.crossing import CensoredT, find_crossing
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


def reach(target: float, runs: Mapping[str, list[Outcome]]) -> dict[str, dict[str, Reach]]:
    """Return what the mean curve over seeds of each name spends until it has a loss.

    Args:
        target: nats per token; NaN if there is none.
        runs: runs by name; those that did not finish are left out.
    """
    if math.isnan(target):
        return {}
    found = {}
    for name, each in runs.items():
        finished = [run for run in each if math.isfinite(run.loss)]
        if finished:
            curve = average_curves([read_curve(run) for run in finished])
            found[name] = {measure: reach_on_curve(curve, measure, target) for measure in MEASURES}
    return found


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
