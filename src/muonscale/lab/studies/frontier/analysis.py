"""The compute-time frontier of a study: what its iso-loss curves say, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from muonscale.errors import StudyError
from muonscale.lab.fits.frontier import Dominance, IsoLoss, judge_dominance, trace_iso_loss
from muonscale.lab.fits.result import FloatArray
from muonscale.lab.fits.steps_to_loss import StepsToLoss
from muonscale.lab.fits.tables import choose_baseline as baseline_of
from muonscale.lab.studies.frontier.config import FrontierSection
from muonscale.lab.studies.frontier.step_time import Throughput, throughput_of
from muonscale.lab.studies.study import Outcomes

Steps = Mapping[float, Mapping[str, StepsToLoss]]
"""By target loss, then by optimizer."""


def frontier_of(
    section: FrontierSection,
    steps: Steps,
    outcomes: Outcomes,
    sequence_length: int,
    *,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Return the iso-loss curves, who lies inside whom, and what the times take for granted.

    Args:
        section: devices and throughput.
        steps: to every target, of every optimizer.
        outcomes: of the runs; coordinate `variant` is their optimizer.
        sequence_length: tokens.
        baseline: the optimizer that the others are judged against; AdamW when not given, or the first.

    Returns:
        `throughput`, `assumptions`, `curves`, `verdicts`, and under `why` the reason if there are none.
        Numbers may be infinite or NaN: JSON needs `muonscale.lab.run_folder.finite`.
    """
    found: dict[str, Any] = {
        "throughput": section.throughput,
        "why": "",
        "assumptions": [],
        "curves": [],
        "verdicts": [],
    }
    reached = {target: _reached(each) for target, each in steps.items()}
    names = list(dict.fromkeys(name for each in reached.values() for name in each))
    if not names:
        return found | {"why": "no run has reached a target loss"}
    base = baseline_of(names, baseline if baseline in names else None)
    try:
        throughput = throughput_of(section, names, outcomes, sequence_length)
        for number, (target, each) in enumerate(reached.items()):
            curves = {
                name: trace_iso_loss(
                    own,
                    _step_seconds(throughput, name, own, section.devices),
                    section.devices,
                    sequence_length,
                    seed=(number, names.index(name)),
                )
                for name, own in each.items()
            }
            found["curves"] += [_curve(target, name, curve) for name, curve in curves.items()]
            found["verdicts"] += [
                _verdict(target, (name, base), judge_dominance(curve, curves[base]))
                for name, curve in curves.items()
                if name != base and base in curves
            ]
    except StudyError as error:
        return found | {"why": str(error), "curves": [], "verdicts": []}
    return found | {"assumptions": throughput.assumptions()}


def _reached(each: Mapping[str, StepsToLoss]) -> dict[str, StepsToLoss]:
    return {name: own for name, own in each.items() if own.reached.any()}


def _step_seconds(
    throughput: Throughput, name: str, steps: StepsToLoss, devices: list[int]
) -> FloatArray:
    """Return the seconds of a step `[n, b]`; of batches that reached the loss."""
    return np.array(
        [
            [
                throughput.seconds(name, round(batch), n) if reached else math.inf
                for batch, reached in zip(steps.batches.tolist(), steps.reached, strict=True)
            ]
            for n in devices
        ]
    )


def _curve(target: float, name: str, curve: IsoLoss) -> dict[str, Any]:
    low, high = curve.band()
    columns = {
        "devices": curve.devices.astype(int),
        "batch": curve.batch,
        "seconds": curve.seconds,
        "low": low,
        "high": high,
        "device_seconds": curve.device_seconds,
        "efficient": curve.efficient,
    }
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    points = [
        dict(zip(columns, row, strict=True)) | {"edge": edge}
        for row, edge in zip(rows, curve.edges, strict=True)
    ]
    return {"target": target, "optimizer": name, "points": points}


def _verdict(target: float, names: tuple[str, str], judged: Dominance) -> dict[str, Any]:
    columns = (judged.ratio, judged.low, judged.high, judged.judged)
    ratios = [
        {"ratio": ratio, "low": low, "high": high, "judged": each}
        for ratio, low, high, each in zip(*(c.tolist() for c in columns), strict=True)
    ]
    mean = judged.mean
    return {
        "target": target,
        "optimizer": names[0],
        "baseline": names[1],
        "inside": judged.inside,
        "share": judged.share,
        "reverse": judged.reverse,
        "why": _why(names, judged),
        "ratios": ratios,
        "mean": {"ratio": mean.value, "low": mean.low, "high": mean.high},
    }


def _why(names: tuple[str, str], judged: Dominance) -> str:
    faster, slower = names
    share, counts = judged.share, judged.judged
    if judged.inside is False:
        faster, slower = slower, faster
        share, counts = judged.reverse, judged.reverse_judged
    if not judged.drawn:
        return "without the noise of seeds nothing is judged: give two seeds"
    if not counts.any():
        return f"at every count of devices {slower} has an upper bound and no time"
    said = f"{faster} is faster at all of {counts.sum()} counts of devices in {share:.1%} of draws"
    left = int((~counts).sum())
    return said + (f"; at {left} more {slower} has an upper bound and no time" if left else "")
