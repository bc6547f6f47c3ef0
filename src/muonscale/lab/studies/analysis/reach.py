"""What runs spend until they have a loss: steps, tokens, operations, seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from muonscale.lab.fits.crossing import CensoredT, find_crossing
from muonscale.lab.studies.analysis.curves import MEASURES, Curve, mean_curve, read_curve
from muonscale.lab.studies.study import Outcome


@dataclass(frozen=True)
class Reach:
    """What was spent until the mean curve over seeds met a loss, or a bound on it."""

    amount: float
    """With `censored`, the bound; NaN where it was not counted."""
    censored: CensoredT
    """`>`: not reached by the whole run; `<`: below it at the first evaluation."""
    end: float
    """What the whole run spent."""


def reach(target: float, runs: Mapping[str, list[Outcome]]) -> dict[str, dict[str, Reach]]:
    """Return what the runs of each name spend until their mean curve has a loss.

    Args:
        target: nats per token; NaN if there is none.
        runs: by name; those that did not finish are left out.
    """
    if math.isnan(target):
        return {}
    found = {}
    for name, each in runs.items():
        finished = [run for run in each if run.result is not None and math.isfinite(run.loss)]
        if finished:
            curve = mean_curve([read_curve(run) for run in finished])
            found[name] = {measure: reach_of(curve, measure, target) for measure in MEASURES}
    return found


def reach_of(curve: Curve, measure: str, target: float) -> Reach:
    """Return what a curve spent, in one of `MEASURES`, until it met a loss."""
    spent = curve.spent[measure]
    end = float(spent[-1])
    if math.isnan(end):
        return Reach(math.nan, "", end)
    if len(spent) == 1:  # a run without evaluations on the way: its end is all that is known
        below = bool(curve.loss[-1] <= target)
        return Reach(end, "<" if below else ">", end)
    crossing = find_crossing(target, spent, curve.loss)
    return Reach(crossing.amount, crossing.censored, end)
