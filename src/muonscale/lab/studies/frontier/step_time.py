"""Seconds of a training step by batch size and devices: measured in runs, or by a stated model.

Every number that a time is made of is among the model's assumptions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

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
from muonscale.lab.studies.frontier.config import MEASURED, FrontierSection
from muonscale.lab.studies.study import Outcome, Outcomes

Assumption = dict[str, str]
"""`what`, `value`, `source`, as `muonscale plan` has them."""


class Throughput(Protocol):
    """A model of the time of a step."""

    def seconds(self, optimizer: str, batch_tokens: int, devices: int) -> float:
        """Return the seconds of a step; infinite where so many devices cannot take the batch."""
        ...

    def assumptions(self) -> list[Assumption]:
        """Return what the seconds that were asked for take for granted."""
        ...


def throughput_of(
    section: FrontierSection, optimizers: Iterable[str], outcomes: Outcomes, sequence_length: int
) -> Throughput:
    """Return the model that a study asks for.

    Args:
        section: what it asks.
        optimizers: variants of the study.
        outcomes: of its runs.
        sequence_length: tokens.

    Raises:
        StudyError: if measured times are asked for, and the runs do not tell them.
    """
    if section.throughput == MEASURED:
        repeated = section.optimizer_work == "repeated"
        return Measured.of(optimizers, outcomes, sequence_length, repeated=repeated)
    from muonscale.lab.studies.frontier.stated_step_time import Stated

    return Stated(section, finished(outcomes), sequence_length)


def finished(outcomes: Outcomes) -> list[Outcome]:
    """Return the runs that ended with a loss."""
    return [o for o in outcomes.values() if o.result is not None and math.isfinite(o.loss)]


def can_share(batch_tokens: int, devices: int, sequence_length: int) -> bool:
    """Return whether a batch divides into as many whole sequences for every device."""
    return batch_tokens > 0 and batch_tokens % (devices * sequence_length) == 0


@dataclass(frozen=True, kw_only=True)
class StepFit:
    """How the seconds of an optimizer's steps depend on the batch."""

    fixed: float
    """Seconds of forward and backward passes, whatever the batch."""
    per_token: float
    """Seconds of them for every token."""
    optimizer: float
    """Seconds of the optimizer's step."""
    runs: int
    batches: SizeRange
    """Tokens of the batches that were timed."""
    largest: float
    """Largest relative error of the passes."""

    def passes(self, tokens: float) -> float:
        """Return the seconds of forward and backward passes of so many tokens."""
        return self.fixed + self.per_token * tokens


def fit_step(batches: FloatArray, passes: FloatArray, optimizer: FloatArray) -> StepFit:
    """Fit `passes = fixed + per_token * batch` by least squares of relative errors, both not below 0.

    What else a machine does makes steps longer and never shorter: the quickest run counts.

    Args:
        batches: tokens of a step of each run, `[n]`.
        passes: seconds of a step without the optimizer's, `[n]`; the least of each batch size counts.
        optimizer: seconds of the optimizer's step, `[k]`; the least counts, whatever the batch.

    Raises:
        StudyError: for values that are not positive, fewer than two batch sizes, or passes that take
            no longer for more tokens.
    """
    batches, passes = check_positive(batch=batches, passes=passes)
    (optimizer,) = check_positive(optimizer=optimizer)
    check_count("the time of a step", "different batch sizes", count_distinct(batches), 2)
    runs, sizes = len(batches), np.unique(batches)
    passes = np.array([passes[batches == size].min() for size in sizes])
    batches = sizes
    columns = np.stack([np.ones_like(batches), batches], axis=1)
    found, _ = nnls(columns / passes[:, None], np.ones_like(passes))
    if found[1] <= 0:
        raise StudyError(
            f"steps of {sizes[-1]:g} tokens took no longer, {passes[-1]:g} s, than the {passes[0]:g} s of {sizes[0]:g}: they "
            "do not tell the time of a token; measure larger batches"
        )
    return StepFit(
        fixed=float(found[0]),
        per_token=float(found[1]),
        optimizer=float(optimizer.min()),
        runs=runs,
        batches=SizeRange.of(batches),
        largest=float(np.abs(columns @ found / passes - 1).max()),
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Step times of runs on one process, continued to many devices by perfect data parallelism."""

    fits: Mapping[str, StepFit]
    """By optimizer."""
    sequence_length: int
    repeated: bool
    """Whether every device does all of the optimizer's work."""
    machine: str
    """What the runs were timed on."""

    @classmethod
    def of(
        cls, optimizers: Iterable[str], outcomes: Outcomes, sequence_length: int, *, repeated: bool
    ) -> Measured:
        """Fit the step times of finished runs.

        Optimizers of one model have the same forward and backward passes: the runs of all of them tell
        how long these take.

        Raises:
            StudyError: if an optimizer has too few batch sizes, or runs had more than one process.
        """
        runs = finished(outcomes)
        fits = {}
        for name in optimizers:
            own = [o for o in runs if o.run.coordinates["variant"] == name]
            models = [o.run.config.model for o in own]
            alike = [o for o in runs if o.run.config.model in models]
            times, steps = (
                np.array([_times(o) for o in each]).reshape(-1, 3) for each in (alike, own)
            )
            try:
                fits[name] = fit_step(times[:, 0], times[:, 1], steps[:, 2])
            except StudyError as error:
                raise StudyError(f"{name}: {error}") from error
        return cls(
            fits=fits, sequence_length=sequence_length, repeated=repeated, machine=_machine(runs)
        )

    def seconds(self, optimizer: str, batch_tokens: int, devices: int) -> float:
        """Return the seconds of a step."""
        if not can_share(batch_tokens, devices, self.sequence_length):
            return math.inf
        fit = self.fits[optimizer]
        work = fit.optimizer if self.repeated else fit.optimizer / devices
        return fit.passes(batch_tokens / devices) + work

    def assumptions(self) -> list[Assumption]:
        """Return the numbers of every optimizer, and what is taken for granted beside them."""
        every = list(self.fits.values())
        least = min((fit.batches.low for fit in every), default=math.nan)
        rows = [
            ("steps", f"timed on {self.machine}", "step_ms of metrics.jsonl, median of each run")
        ]
        for name, fit in self.fits.items():
            rows += self._rows(name, fit)
        rows += [
            ("devices", "all as the machine of the runs", "assumption"),
            ("data parallelism", "perfect: B/n tokens on each of n devices, no communication, no waiting",
             "assumption"),
            ("batches", f"shared as whole sequences of {self.sequence_length:,} tokens, as many on each device",
             "as `muonscale train` asks"),
            ("fewer tokens than were timed",
             f"the line is continued below {least:,.0f} tokens, down to {self.sequence_length:,}", "assumption"),
            ("step times", "exact: intervals hold the noise of the steps alone", "assumption"),
            ("not counted", "reading data, evaluation, checkpoints, memory", ""),
        ]  # fmt: skip
        return [{"what": w, "value": value, "source": source} for w, value, source in rows]

    def _rows(self, name: str, fit: StepFit) -> list[tuple[str, str, str]]:
        span = f"{fit.batches.low:,.0f} to {fit.batches.high:,.0f} tokens"
        share = "repeated on each device" if self.repeated else "divided by the number of devices"
        return [
            (
                f"passes of {name}",
                f"{_ms(fit.fixed)} ms + {_ms(fit.per_token * 1000)} ms per 1,000 tokens",
                f"least squares of relative errors, the quickest of each batch size of {fit.runs} runs with "
                f"this model, of {span}; largest error {fit.largest:.2%}",
            ),
            (
                f"optimizer of {name}",
                f"{_ms(fit.optimizer)} ms, {share}",
                "optimizer_ms, least of the medians of its runs; frontier.optimizer_work",
            ),
        ]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4g}"


def _times(outcome: Outcome) -> tuple[float, float, float]:
    """Return tokens, seconds without the optimizer's and seconds of the optimizer of a run's step.

    Raises:
        StudyError: if the run did not record them, or they are not of one process and one batch size.
    """
    config = outcome.run.config
    records = [r for r in outcome.folder.read_metrics() if r["kind"] == "train"]
    if not records:
        raise StudyError(
            f"{outcome.folder.metrics} is not whole; remove the folder {outcome.folder.path}, and run the study again"
        )
    processes = outcome.folder.environment().get("processes", 1)
    if processes != 1 or config.train.batch_schedule:
        what = f"{processes} processes" if processes != 1 else "train.batch_schedule"
        raise StudyError(
            f"{outcome.run.label}: step times are measured in runs of one process and one batch size; "
            f"this one has {what}, so leave it out"
        )
    step = statistics.median(r["step_ms"] for r in records) / 1000
    optimizer = statistics.median(r["optimizer_ms"] for r in records) / 1000
    return config.train.batch_tokens, step - optimizer, optimizer


def _machine(runs: list[Outcome]) -> str:
    """Return what runs were timed on, all kinds of it."""
    found = {}
    for outcome in runs:
        env = outcome.folder.environment()
        threads = env.get("threads", 1)
        name = env.get("device_name", "an unnamed device")
        found[f"{name}, {threads} thread{'s' * (threads != 1)}"] = None
    return "; ".join(found)
