"""What studies have in common: planned runs, what became of them, and what a study has to answer.

A study is a function from what has been found so far to the runs that are wanted (`Study.plan`): one
whose later runs depend on earlier ones returns more of them once those are finished. Everything
else, from folders to executors, is the same for all (`muonscale.lab.studies.engine`).
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
from muonscale.lab.studies.config import StudyConfig

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
"""Keys that change where and how a run is done and, up to rounding, not what comes out."""

OF_THE_STUDY = ("run.path", "run.seed", "run.threads")
"""Keys that the study sets for every run."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    coordinates: Mapping[str, Coordinate]
    """What tells it from the others, such as variant, lr and seed; in the order they are shown."""
    config: Config
    """As it would be trained, but for `run.path` and `run.threads`."""

    @cached_property
    def id(self) -> str:
        """Hash of the configuration: runs that train the same are one run.

        Keys that have their default are left out, so that a key added later changes no id.
        """
        tree = self.config.model_dump(mode="json", exclude=NOT_IDENTITY, exclude_defaults=True)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """What people call it."""
        return " ".join(
            value if isinstance(value, str) else f"{key}={value:g}"
            for key, value in self.coordinates.items()
        )

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.label).strip('-')}-{self.id}"


@dataclass(frozen=True)
class Outcome:
    """What has become of a planned run."""

    run: PlannedRun
    folder: RunFolder
    state: StateT
    result: Mapping[str, Any] | None = None
    """Its result.json, of a finished run."""
    reason: str = ""
    """Of a failed or diverged one."""

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to be done."""
        return self.state in ("finished", "diverged", "failed")

    @property
    def loss(self) -> float:
        """Held-out loss at the end, nats per token; infinite if it diverged, NaN if there is none."""
        if self.result is None:
            return math.inf if self.state == "diverged" else math.nan
        loss = self.result["held_out_loss"]
        return math.inf if loss is None else float(loss)


Outcomes = Mapping[str, Outcome]
"""By the id of the run, in the order of the plan."""


class Study(Protocol):
    """What a kind of study has to answer. One file each."""

    config: StudyConfig

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return all runs that are wanted, given what has become of some of them.

        The answer may grow with what is known and never shrinks.
        """
        ...

    def analyse(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return what was found, as plain values for JSON: a function of the run folders alone.

        A study with a verdict has it under `passed`: True, False or, undecided, None. Under `stopped` it
        says why it cannot go on to what it was to answer, if so.
        """
        ...

    def page(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report of `analyse`'s answer."""
        ...


PartT = Literal["tuning", "final", "check", "instead"]
"""What runs are for: to find hyper-parameters, to use them, to check the finding; `instead` are runs
that are not done, for comparison."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Runs that are counted before they can be named."""

    name: str
    part: PartT
    like: PlannedRun
    """A run that costs as much as each of them."""
    runs: int
    most: int
    """How many they may become."""


@runtime_checkable
class Forecasting(Protocol):
    """A study that knows how much there will be to do before it knows which runs."""

    def expected(self, outcomes: Outcomes) -> list[Expected]:
        """Return all runs from the first to the last, known or not, and those they save."""
        ...


class Planner:
    """Makes runs of a study out of its base recipe, the overrides of all and those of each.

    Raises:
        ConfigError: for a recipe or an override that cannot be used.
    """

    def __init__(self, config: StudyConfig) -> None:
        self._tree = read_recipe(config.base)
        self._common = config.set
        self._threads = config.executor.threads
        if wrong := sorted(set(config.set) & set(OF_THE_STUDY)):
            raise ConfigError(f"set.{wrong[0]}: the study sets {', '.join(OF_THE_STUDY)} itself")

    def run(
        self, coordinates: Mapping[str, Coordinate], *overrides: Mapping[str, Any], seed: int
    ) -> PlannedRun:
        """Return a run; of two values of a key the later one counts."""
        given = {key: value for part in (self._common, *overrides) for key, value in part.items()}
        given |= {"run.seed": seed, "run.path": "run", "run.threads": self._threads}
        try:
            return PlannedRun(coordinates, resolve_values(deepcopy(self._tree), deepcopy(given)))
        except ConfigError as error:
            label = PlannedRun(coordinates, None).label  # type: ignore[arg-type]
            raise ConfigError(f"run {label!r} of the study: {error}") from error


def unique(runs: Iterable[PlannedRun]) -> dict[str, PlannedRun]:
    """Return runs by their id, in order.

    Raises:
        StudyError: if two are the same run under different names.
    """
    found: dict[str, PlannedRun] = {}
    for run in runs:
        other = found.setdefault(run.id, run)
        if other.label != run.label:
            raise StudyError(
                f"the runs {other.label!r} and {run.label!r} have the same configuration: a study "
                "compares runs that differ"
                ", so leave one of them out"
            )
    return found
