"""Validation loss along finished runs, against steps, tokens, FLOPs and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from muonscale.errors import StudyError
from muonscale.lab.studies.study import Outcome

MEASURES = ("steps", "tokens", "flops", "seconds")
"""Quantities that a run spends."""


@dataclass(frozen=True)
class LossCurve:
    """Validation loss along a run, as float64 [evaluations]."""

    loss: np.ndarray
    spent: Mapping[str, np.ndarray]
    """The amount spent at each evaluation, for each of `MEASURES`."""


def read_curve(outcome: Outcome) -> LossCurve:
    """Return the validation losses of a finished run.

    Seconds are steps times the run's median step time: they leave out evaluations, checkpoints and
    pauses of the machine. FLOPs include Newton-Schulz and are NaN if they were not counted.

    Raises:
        StudyError: if the run's metrics are incomplete.
    """
    records = outcome.folder.read_metrics()
    step_ms = [r["step_ms"] for r in records if r["kind"] == "train"]
    found = [r for r in records if r["kind"] == "eval" and r["validation_loss"] is not None]
    if not found or len(step_ms) < found[-1]["step"]:
        raise StudyError(
            f"{outcome.folder.metrics} is incomplete; remove the folder {outcome.folder.path}, and "
            "run the study again"
        )
    steps = np.array([r["step"] for r in found])
    tokens = np.array([r["tokens"] for r in found], dtype=np.float64)
    cost: Any = outcome.folder.environment().get("flops")
    flops = np.full(len(tokens), np.nan)
    if cost is not None:
        flops = tokens * cost["per_token"] + steps * float(cost["newton_schulz_per_step"])
    spent = {
        "steps": steps.astype(np.float64),
        "tokens": tokens,
        "flops": flops,
        "seconds": steps * float(np.median(step_ms)) / 1000,
    }
    return LossCurve(np.array([r["validation_loss"] for r in found], dtype=np.float64), spent)


def average_curves(curves: Sequence[LossCurve]) -> LossCurve:
    """Return the mean over runs that were evaluated at the same steps.

    Raises:
        StudyError: if they were not.
    """
    if len({tuple(curve.spent["steps"]) for curve in curves}) != 1:
        counts = sorted({len(curve.spent["steps"]) for curve in curves})
        raise StudyError(
            f"runs were evaluated at different steps, {counts} times, so their curves have no "
            "mean; give all of them the same eval.every"
        )
    spent = {name: np.mean([curve.spent[name] for curve in curves], axis=0) for name in MEASURES}
    return LossCurve(np.mean([curve.loss for curve in curves], axis=0), spent)
