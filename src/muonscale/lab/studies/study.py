"""The parts that every study has: planned runs, their outcomes, and the protocol of a study.

A study is a function from the outcomes so far to the runs it wants (`Study.plan`). A study whose later
runs depend on earlier ones returns more of them once those have ended. Folders, executors and the
writing of reports are the same for all kinds (`muonscale.lab.studies.engine`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

from muonscale.errors import ConfigError, StudyError
from muonscale.lab.config.load import Config, read_recipe, resolve_values
from muonscale.lab.report.page import Page
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.studies.config import SET_BY_STUDY, StudyConfig

Coordinate = str | float | int
StateT = Literal["finished", "diverged", "failed", "running", "waiting"]

NOT_IDENTITY = {
    "run": {"path", "threads", "device"},
    "data": {"cache"},
    "checkpoint": True,
    "parallel": True,
    "track": True,
    "profile": True,
    "train": {"micro_batch_tokens", "activation_checkpointing", "compile"},
}
"""Keys that change where and how a run is done but, up to rounding, not its result."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    coordinates: Mapping[str, Coordinate]
    """Values that distinguish it from the other runs, such as variant, lr and seed, in display order."""
    config: Config
    """The configuration it is trained with, except for `run.path`."""

    @cached_property
    def id(self) -> str:
        """Hash of the configuration: runs that train the same are one run.

        Keys at their default are left out, so that a key added later changes no id.
        """
        tree = self.config.model_dump(mode="json", exclude=NOT_IDENTITY, exclude_defaults=True)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """The coordinates as text."""
        return format_coordinates(self.coordinates)

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.label).strip('-')}-{self.id}"


def format_coordinates(coordinates: Mapping[str, Coordinate]) -> str:
    """Return coordinates as text, such as `muon lr=0.01 seed=0`."""
    return " ".join(
        value if isinstance(value, str) else f"{key}={value:g}"
        for key, value in coordinates.items()
    )


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
        """Validation loss at the end, nats per token; infinite if the run diverged, NaN if unknown."""
        if self.result is None:
            return math.inf if self.state == "diverged" else math.nan
        loss = self.result["held_out_loss"]
        return math.inf if loss is None else float(loss)


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

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return all runs that are wanted, given the outcomes so far.

        The list may grow with the outcomes and never shrinks.
        """
        ...

    def analyze(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return the findings as plain values for JSON: a function of the run folders alone.

        A study with a verdict returns it under `passed`: True, False or, if undecided, None. A study that
        cannot continue says why under `stopped`.
        """
        ...

    def report(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report of the findings of `analyze`."""
        ...


PartT = Literal["tuning", "final", "check", "instead"]
"""The purpose of runs: to find hyper-parameters, to use them, to check the finding; `instead` stands
for runs that are not done, for comparison."""


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


class Planner:
    """Makes the runs of a study from its base recipe, common overrides and overrides of each run.

    Raises:
        ConfigError: for a recipe or an override that cannot be used.
    """

    def __init__(self, config: StudyConfig) -> None:
        self._tree = read_recipe(config.base)
        self._common = config.set
        self._threads = config.executor.threads
        if wrong := sorted(set(config.set) & set(SET_BY_STUDY)):
            raise ConfigError(f"set.{wrong[0]}: the study sets {', '.join(SET_BY_STUDY)} itself")

    def run(
        self, coordinates: Mapping[str, Coordinate], *overrides: Mapping[str, Any], seed: int
    ) -> PlannedRun:
        """Return a run; a later override of a key replaces an earlier one."""
        given = {key: value for part in (self._common, *overrides) for key, value in part.items()}
        given |= {"run.seed": seed, "run.path": "run", "run.threads": self._threads}
        try:
            return PlannedRun(coordinates, resolve_values(deepcopy(self._tree), deepcopy(given)))
        except ConfigError as error:
            label = format_coordinates(coordinates)
            raise ConfigError(f"run {label!r} of the study: {error}") from error


def index_runs(runs: Iterable[PlannedRun]) -> dict[str, PlannedRun]:
    """Return runs by their id, in order.

    Raises:
        StudyError: if two names stand for the same run.
    """
    found: dict[str, PlannedRun] = {}
    for run in runs:
        other = found.setdefault(run.id, run)
        if other.label != run.label:
            raise StudyError(
                f"the runs {other.label!r} and {run.label!r} have the same configuration; leave one out"
            )
    return found
