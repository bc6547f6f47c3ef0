"""The compute-time frontier of a study: iso-loss curves and their comparison, as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from muonscale.errors import StudyError
from muonscale.lab.fits.frontier import Dominance, IsoLoss, judge_dominance, trace_iso_loss
from muonscale.lab.fits.steps_to_loss import StepsToLoss
from muonscale.lab.fits.tables import choose_baseline
from muonscale.lab.studies.frontier.config import MEASURED, FrontierSection
from muonscale.lab.studies.frontier.stated_step_time import StatedStepTime
from muonscale.lab.studies.frontier.step_time import MeasuredStepTime, StepTimeModel, finished_runs
from muonscale.lab.studies.study import Outcomes

Steps = Mapping[float, Mapping[str, StepsToLoss]]
"""By target loss, then by optimizer."""


def choose_step_time(
    section: FrontierSection, optimizers: Iterable[str], outcomes: Outcomes, sequence_length: int
) -> StepTimeModel:
    """Return the model of step times that a study asks for, see `analyze_frontier`.

    Raises:
        StudyError: if measured times are asked for and the runs do not determine them.
    """
    if section.throughput == MEASURED:
        repeated = section.optimizer_work == "repeated"
        return MeasuredStepTime.of(optimizers, outcomes, sequence_length, repeated=repeated)
    return StatedStepTime(section, finished_runs(outcomes), sequence_length)


def analyze_frontier(
    section: FrontierSection,
    steps: Steps,
    outcomes: Outcomes,
    sequence_length: int,
    *,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Return the iso-loss curves, which one is inside which, and the assumptions of the times.

    Args:
        section: devices and throughput.
        steps: steps to every target of every optimizer.
        outcomes: outcomes of the runs; coordinate `variant` is their optimizer.
        sequence_length: tokens of a sequence.
        baseline: the optimizer that the others are judged against; AdamW when not given, or the
            first.

    Returns:
        `throughput`, `assumptions`, `curves`, `verdicts`, and under `why` the reason if there are
        none. Numbers may be infinite or NaN: JSON needs `muonscale.lab.files.drop_nonfinite`.
    """
    found: dict[str, Any] = {"throughput": section.throughput, "why": "", "assumptions": []}
    found |= {"curves": [], "verdicts": []}
    reached = {
        target: {name: own for name, own in each.items() if own.reached.any()}
        for target, each in steps.items()
    }
    names = list(dict.fromkeys(name for each in reached.values() for name in each))
    if not names:
        return found | {"why": "no run has reached a target loss"}
    base = choose_baseline(names, baseline if baseline in names else None)
    curves, verdicts = [], []
    try:
        model = choose_step_time(section, names, outcomes, sequence_length)
        for number, (target, each) in enumerate(reached.items()):
            lines = {}
            for name, own in each.items():
                batches = zip(own.batches.tolist(), own.reached, strict=True)
                usable = [(round(batch), reached_it) for batch, reached_it in batches]
                seconds = [
                    [model.seconds(name, b, n) if ok else math.inf for b, ok in usable]
                    for n in section.devices
                ]
                lines[name] = trace_iso_loss(
                    own,
                    np.array(seconds),
                    section.devices,
                    sequence_length,
                    seed=(number, names.index(name)),
                )
                curves.append(_curve_tree(target, name, lines[name]))
            verdicts += [
                _verdict_tree(target, (name, base), judge_dominance(line, lines[base]))
                for name, line in lines.items()
                if name != base and base in lines
            ]
    except StudyError as error:
        return found | {"why": str(error)}
    return found | {"curves": curves, "verdicts": verdicts, "assumptions": model.assumptions()}


def _rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    values = (list(column) for column in columns.values())
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _curve_tree(target: float, name: str, curve: IsoLoss) -> dict[str, Any]:
    low, high = curve.band()
    columns = {
        "devices": curve.devices.astype(int).tolist(),
        "batch": curve.batch.tolist(),
        "seconds": curve.seconds.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "device_seconds": curve.device_seconds.tolist(),
        "efficient": curve.efficient.tolist(),
        "edge": curve.edges,
    }
    return {"target": target, "optimizer": name, "points": _rows(columns)}


def _verdict_tree(target: float, names: tuple[str, str], judged: Dominance) -> dict[str, Any]:
    columns = {
        "ratio": judged.ratio.tolist(),
        "low": judged.low.tolist(),
        "high": judged.high.tolist(),
        "judged": judged.judged.tolist(),
    }
    mean = judged.mean
    return {
        "target": target,
        "optimizer": names[0],
        "baseline": names[1],
        "inside": judged.inside,
        "share": judged.share,
        "reverse": judged.reverse,
        "why": _explain(names, judged),
        "ratios": _rows(columns),
        "mean": {"ratio": mean.value, "low": mean.low, "high": mean.high},
    }


def _explain(names: tuple[str, str], judged: Dominance) -> str:
    (faster, slower), share, counts = names, judged.share, judged.judged
    if judged.inside is False:
        (slower, faster), share, counts = names, judged.reverse, judged.reverse_judged
    if not judged.drawn:
        return "the noise of seeds is not known, so nothing is judged: give two seeds"
    if not counts.any():
        return f"at every number of devices the time of {slower} is only an upper bound"
    text = f"{faster} is faster at all of {counts.sum()} numbers of devices in {share:.1%} of draws"
    left = int((~counts).sum())
    return text + (f"; at {left} more the time of {slower} is only an upper bound" if left else "")
