"""What finished runs measured on the way: held-out loss against tokens, operations and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from muonscale.errors import StudyError
from muonscale.lab.studies.study import Outcome

MEASURES = ("steps", "tokens", "flops", "seconds")
"""What a loss can be drawn against."""


@dataclass(frozen=True)
class Curve:
    """Held-out loss in the course of a run: float64 [evaluations] each."""

    loss: np.ndarray
    spent: Mapping[str, np.ndarray]
    """By name of `MEASURES`."""


def read_curve(outcome: Outcome) -> Curve:
    """Return the held-out losses of a finished run.

    Seconds are steps times the run's median step: evaluations and checkpoints are not in them, nor
    what else the machine did for a while.

    Args:
        outcome: of the run.

    Raises:
        StudyError: if the run did not record what a finished one does.
    """
    records = outcome.folder.read_metrics()
    step_ms = [r["step_ms"] for r in records if r["kind"] == "train"]
    found = [r for r in records if r["kind"] == "eval" and r["held_out_loss"] is not None]
    if not found or len(step_ms) < found[-1]["step"]:
        raise StudyError(
            f"{outcome.folder.metrics} is not whole; remove the folder {outcome.folder.path}, and run the study again"
        )
    steps = np.array([r["step"] for r in found])
    tokens = np.array([r["tokens"] for r in found], dtype=np.float64)
    flops = _flops(outcome, tokens, steps)
    spent = {
        "steps": steps.astype(np.float64),
        "tokens": tokens,
        "flops": flops,
        "seconds": steps * float(np.median(step_ms)) / 1000,
    }
    return Curve(np.array([r["held_out_loss"] for r in found], dtype=np.float64), spent)


def _flops(outcome: Outcome, tokens: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return the operations of so many tokens and steps, Newton-Schulz included; NaN if not counted."""
    cost: Any = outcome.folder.environment().get("flops")
    if cost is None:
        return np.full(len(tokens), np.nan)
    return tokens * cost["per_token"] + steps * float(cost["newton_schulz_per_step"])


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean over runs that were evaluated at the same steps.

    Raises:
        StudyError: if they were not.
    """
    if len({tuple(curve.spent["steps"]) for curve in curves}) != 1:
        raise StudyError(
            f"runs were evaluated at different steps, {sorted({len(curve.spent['steps']) for curve in curves})} times, so "
            "there is no mean curve; give all the same eval.every"
        )
    spent = {name: np.mean([curve.spent[name] for curve in curves], axis=0) for name in MEASURES}
    return Curve(np.mean([curve.loss for curve in curves], axis=0), spent)
