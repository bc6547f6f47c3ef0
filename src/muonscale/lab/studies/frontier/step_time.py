"""Seconds of a training step by batch size and devices, measured in runs.

Every number that a time depends on is among the assumptions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from scipy.optimize import nnls

from muonscale.errors import StudyError
from muonscale.lab.fits.result import (
    FloatArray,
    SizeRange,
    check_count,
    check_positive,
    count_distinct,
)
from muonscale.lab.studies.study import Outcome, Outcomes

if TYPE_CHECKING:
    from muonscale.lab.estimate.assumptions import Assumption


class StepTimeModel(Protocol):
    """A model of the time of a step."""

    def seconds(self, optimizer: str, batch_tokens: int, devices: int) -> float:
        """Return the seconds of a step; infinite if the devices cannot share the batch."""
        ...

    def assumptions(self) -> list[Assumption]:
        """Return the assumptions behind the seconds that were asked for."""
        ...


def finished_runs(outcomes: Outcomes) -> list[Outcome]:
    """Return the runs that ended with a loss."""
    return [o for o in outcomes.values() if math.isfinite(o.loss)]


def can_share(batch_tokens: int, devices: int, sequence_length: int) -> bool:
    """Return whether a batch divides into equal numbers of whole sequences for every device."""
    return batch_tokens > 0 and batch_tokens % (devices * sequence_length) == 0


@dataclass(frozen=True, kw_only=True)
class StepFit:
    """Seconds of an optimizer's steps as a function of the batch."""

    fixed: float
    """Seconds of forward and backward passes for any batch."""
    per_token: float
    """Seconds of the passes per token."""
    optimizer: float
    """Seconds of the optimizer's step."""
    runs: int
    batches: SizeRange
    """Tokens of the measured batches."""
    largest: float
    """Largest relative error of the passes."""

    def passes(self, tokens: float) -> float:
        """Return the seconds of forward and backward passes of a number of tokens."""
        return self.fixed + self.per_token * tokens


def fit_step(batches: FloatArray, passes: FloatArray, optimizer: FloatArray) -> StepFit:
    """Fit `passes = fixed + per_token * batch`, both at least 0, to least relative squares.

    Whatever else a machine does makes steps longer and never shorter, so the quickest run counts.

    Args:
        batches: tokens of a step of each run, `[n]`.
        passes: seconds of a step without the optimizer's, `[n]`; the least of each batch size
            counts.
        optimizer: seconds of the optimizer's step, `[k]`; the least counts for all batch sizes.

    Raises:
        StudyError: for values that are not positive, fewer than two batch sizes, or passes that
            take no longer for more tokens.
    """
    batches, passes = check_positive(batch=batches, passes=passes)
    (optimizer,) = check_positive(optimizer=optimizer)
    check_count("the time of a step", "different batch sizes", count_distinct(batches), 2)
    runs, sizes = len(batches), np.unique(batches)
    passes = np.array([passes[batches == size].min() for size in sizes])
    columns = np.stack([np.ones_like(sizes), sizes], axis=1)
    found, _ = nnls(columns / passes[:, None], np.ones_like(passes))
    if found[1] <= 0:
        raise StudyError(
            f"steps of {sizes[-1]:g} tokens took no longer, {passes[-1]:g} s, than the "
            f"{passes[0]:g} s of {sizes[0]:g}, so the time of a token is not known; measure larger "
            "batches"
        )
    return StepFit(
        fixed=float(found[0]),
        per_token=float(found[1]),
        optimizer=float(optimizer.min()),
        runs=runs,
        batches=SizeRange.of(sizes),
        largest=float(np.abs(columns @ found / passes - 1).max()),
    )


@dataclass(frozen=True, kw_only=True)
class MeasuredStepTime:
    """Step times of runs on one process, continued to many devices by perfect data parallelism."""

    fits: Mapping[str, StepFit]
    """Fits by optimizer."""
    sequence_length: int
    repeated: bool
    """Whether every device does all of the optimizer's work."""
    machine: str
    """The machine that the runs were timed on."""

    @classmethod
    def of(
        cls, optimizers: Iterable[str], outcomes: Outcomes, sequence_length: int, *, repeated: bool
    ) -> MeasuredStepTime:
        """Fit the step times of finished runs.

        Optimizers of one model have the same forward and backward passes, so the runs of all of
        them measure these.

        Raises:
            StudyError: if an optimizer has too few batch sizes, or runs had more than one process.
        """
        runs = finished_runs(outcomes)
        fits = {}
        for name in optimizers:
            own = [o for o in runs if o.run.coordinates["variant"] == name]
            models = [o.run.config.model for o in own]
            same_model = [o for o in runs if o.run.config.model in models]
            try:
                times, steps = (
                    np.array([_read_times(o) for o in each]).reshape(-1, 3)
                    for each in (same_model, own)
                )
                fits[name] = fit_step(times[:, 0], times[:, 1], steps[:, 2])
            except StudyError as error:
                raise StudyError(f"{name}: {error}") from error
        machines = {}
        for outcome in runs:
            env = outcome.folder.environment()
            threads = env.get("threads", 1)
            name = env.get("device_name", "an unnamed device")
            machines[f"{name}, {threads} thread{'s' * (threads != 1)}"] = None
        return cls(
            fits=fits,
            sequence_length=sequence_length,
            repeated=repeated,
            machine="; ".join(machines),
        )

    def seconds(self, optimizer: str, batch_tokens: int, devices: int) -> float:
        """Return the seconds of a step."""
        if not can_share(batch_tokens, devices, self.sequence_length):
            return math.inf
        fit = self.fits[optimizer]
        work = fit.optimizer if self.repeated else fit.optimizer / devices
        return fit.passes(batch_tokens / devices) + work

    def assumptions(self) -> list[Assumption]:
        """Return the fit of every optimizer, and the assumptions of the continuation."""
        length = self.sequence_length
        least = min((fit.batches.low for fit in self.fits.values()), default=math.nan)
        share = "repeated on each device" if self.repeated else "divided by the number of devices"
        rows = [
            ("steps", f"timed on {self.machine}", "step_ms of metrics.jsonl, median of each run")
        ]
        for name, fit in self.fits.items():
            fixed, slope = f"{1000 * fit.fixed:.4g}", f"{1000 * (fit.per_token * 1000):.4g}"
            rows += [
                (
                    f"passes of {name}",
                    f"{fixed} ms + {slope} ms per 1,000 tokens",
                    "least squares of relative errors, the quickest of each batch size of "
                    f"{fit.runs} runs with this model, of {fit.batches.low:,.0f} to "
                    f"{fit.batches.high:,.0f} tokens; largest error {fit.largest:.2%}",
                ),
                (
                    f"optimizer of {name}",
                    f"{1000 * fit.optimizer:.4g} ms, {share}",
                    "optimizer_ms, least of the medians of its runs; frontier.optimizer_work",
                ),
            ]
        rows += [
            ("devices", "all equal to the machine of the runs", "assumption"),
            ("data "
                "parallelism", "perfect: B/n tokens on each of n devices, no communication, no "
                    "waiting",
             "assumption"),
            ("batches", f"divided into whole sequences of {length:,} tokens, equally many on each "
                "device",
             "as in `muonscale train`"),
            ("fewer tokens than were timed",
             f"the line is continued below {least:,.0f} tokens, down to {length:,}", "assumption"),
            ("step times", "exact: intervals include the noise of the steps alone", "assumption"),
            ("not counted", "reading data, evaluation, checkpoints, memory", ""),
        ]  # fmt: skip
        return [{"what": w, "value": value, "source": source} for w, value, source in rows]


def _read_times(outcome: Outcome) -> tuple[float, float, float]:
    """Return a step's tokens, its seconds without the optimizer, and the optimizer's seconds.

    Raises:
        StudyError: if the run did not record them, or had several processes or batch sizes.
    """
    config = outcome.run.config
    records = outcome.folder.read_metrics("train")
    if not records:
        raise StudyError(
            f"{outcome.folder.metrics} is incomplete; remove the folder {outcome.folder.path}, and "
            "run the study again"
        )
    processes = outcome.folder.environment().get("processes", 1)
    if processes != 1 or config.train.batch_schedule:
        what = f"{processes} processes" if processes != 1 else "train.batch_schedule"
        raise StudyError(
            f"{outcome.run.label}: step times are measured in runs of one process and one batch "
            f"size; this one has {what}"
        )
    step = statistics.median(r["step_ms"] for r in records) / 1000
    optimizer = statistics.median(r["optimizer_ms"] for r in records) / 1000
    return config.train.batch_tokens, step - optimizer, optimizer
