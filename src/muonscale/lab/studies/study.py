"""What a kind of study implements, and the outcomes of its runs.

A study is a function from the outcomes so far to the runs it wants (`Study.plan`). A study whose
later runs depend on earlier ones returns more of them once those have ended. Folders, executors and
the writing of reports are the same for all kinds (`muonscale.lab.studies.engine`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from muonscale.lab.report.page import Page
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.studies.config import StudyConfig
from muonscale.lab.studies.planned_run import ModelFacts, PlannedRun

StateT = Literal["finished", "diverged", "failed", "running", "waiting"]


@dataclass(frozen=True)
class Outcome:
    """A planned run and its state."""

    run: PlannedRun
    folder: RunFolder
    state: StateT
    result: Mapping[str, Any] | None = None
    """The result.json of a finished run."""
    reason: str = ""
    """Why a run failed or diverged."""

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in ("finished", "diverged", "failed")

    @property
    def loss(self) -> float:
        """Final validation loss, nats per token; infinite if the run diverged, NaN if unknown."""
        if self.result is None:
            return math.inf if self.state == "diverged" else math.nan
        loss = self.result["validation_loss"]
        return math.inf if loss is None else float(loss)

    @property
    def train_seconds(self) -> float | None:
        """Seconds of training steps of a finished run; None if its records of steps were lost."""
        return None if self.result is None else self.result["train_seconds"]

    @property
    def steps(self) -> int:
        """Steps of the run: those planned, or fewer of one that reached `train.target_loss`."""
        return self.run.config.steps if self.result is None else self.result["step"]


Outcomes = Mapping[str, Outcome]
"""Outcomes by the id of the run, in the order of the plan."""


def collect_losses(outcomes: Iterable[Outcome]) -> dict[int, float]:
    """Return the losses of runs by seed; runs that failed or have not ended are left out."""
    return {int(o.run.coordinates["seed"]): o.loss for o in outcomes if not math.isnan(o.loss)}


class Study(Protocol):
    """What a kind of study implements."""

    @property
    def config(self) -> StudyConfig:
        """The configuration."""
        ...

    @property
    def facts(self) -> ModelFacts:
        """What the plan asks about models."""
        ...

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return all runs that are wanted, given the outcomes so far.

        The list may grow with the outcomes and never shrinks.
        """
        ...

    def analyze(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return the findings as plain values for JSON: a function of the run folders alone.

        A study with a verdict returns it under `passed`: True, False or, if undecided, None. A
        study that cannot continue says why under `stopped`.
        """
        ...

    def report(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report of the findings of `analyze`."""
        ...


PartT = Literal["tuning", "final", "check", "instead"]
"""The purpose of runs: to find hyper-parameters, to use them, to check the finding; `instead`
stands for runs that are not done, for comparison."""


@dataclass(frozen=True, kw_only=True)
class ExpectedRuns:
    """Runs that can be counted before they can be named."""

    name: str
    part: PartT
    example: PlannedRun
    """A run that costs as much as each of them."""
    runs: int
    most: int
    """The largest number they may become."""


@runtime_checkable
class Forecasting(Protocol):
    """A study that can count all its runs before it can name them."""

    def expected(self, outcomes: Outcomes) -> list[ExpectedRuns]:
        """Return all runs from the first to the last, known or not, and those they replace."""
        ...
