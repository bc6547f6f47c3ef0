"""Planned runs of a study, and what its plan asks about models.

A run is made from a recipe and overrides; its identity is what its result depends on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from muonscale.errors import ConfigError, MuonscaleError, StudyError
from muonscale.lab.config.load import Config, read_recipe, resolve_values
from muonscale.lab.files import read_object
from muonscale.lab.studies.config import SET_BY_STUDY, StudyConfig

if TYPE_CHECKING:
    from muonscale.lab.models.widen import GrowT

Coordinate = str | float | int

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
    """Values that distinguish it from the other runs, such as variant, lr and seed, in display
    order."""
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


class Planner:
    """Makes the runs of a study from its base recipe, common overrides and overrides of each run.

    Raises:
        ConfigError: for a recipe or an override that cannot be used.
    """

    def __init__(self, config: StudyConfig) -> None:
        self._tree = read_recipe(config.base)
        self._common = config.set
        self._threads = config.executor.threads
        self._made: dict[str, PlannedRun] = {}
        if wrong := sorted(set(config.set) & set(SET_BY_STUDY)):
            raise ConfigError(f"set.{wrong[0]}: the study sets {', '.join(SET_BY_STUDY)} itself")

    def run(
        self, coordinates: Mapping[str, Coordinate], *overrides: Mapping[str, Any], seed: int
    ) -> PlannedRun:
        """Return a run; a later override of a key replaces an earlier one.

        A study plans again after every wave of runs, so runs that were made are kept.
        """
        given = {key: value for part in (self._common, *overrides) for key, value in part.items()}
        given |= {"run.seed": seed, "run.path": "run", "run.threads": self._threads}
        key = json.dumps([dict(coordinates), given], default=str)
        if key not in self._made:
            try:
                config = resolve_values(deepcopy(self._tree), deepcopy(given))
            except ConfigError as error:
                label = format_coordinates(coordinates)
                raise ConfigError(f"run {label!r} of the study: {error}") from error
            self._made[key] = PlannedRun(coordinates, config)
        return self._made[key]


class ModelFacts:
    """What a plan asks about models, which takes torch and transformers, seconds, to find.

    The engine keeps the answers in plan.json, so that `study status` needs neither.
    """

    def __init__(self, plan: Path) -> None:
        """Read the answers that a plan.json has; there are none before a study begins."""
        try:
            self.known: dict[str, Any] = (read_object(plan, "") or {}).get("models", {})
        except MuonscaleError:  # they are found again, and the file is written anew
            self.known = {}

    def find(self, question: str, config: Config, answer: Callable[[], Any]) -> Any:
        """Return the answer to a question about the model of a run, a plain value for JSON.

        Answers about models that a file decides, a `config.json` or a tokenizer, are not kept.
        """
        model, data = config.model, config.data
        if model.preset is None or data.tokenizer is not None:
            return answer()
        facts = [
            question,
            model.model_dump(mode="json"),
            data.vocab_size,
            data.sequence_length,
            version("muonscale"),
            version("transformers"),
        ]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        if key not in self.known:
            self.known[key] = answer()
        return self.known[key]

    def find_fields(
        self,
        config: Config,
        width: int | None,
        *,
        layers: int | None = None,
        grow: GrowT = "heads",
    ) -> dict[str, Any]:
        """Return the fields that give the model of a run another width or number of layers.

        Args:
            config: configuration of the run.
            width: the width, None to keep it.
            layers: the number of layers, None to keep it.
            grow: what gets larger with the width; see `fields_at`.
        """

        def find() -> dict[str, Any]:
            from muonscale.lab.models.widen import fields_at
            from muonscale.lab.training.dry_run import planned_shape

            shape = planned_shape(config)
            fields: dict[str, Any] = {} if width is None else fields_at(shape, width, grow)
            if layers is not None:
                fields[shape.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
            return fields

        return self.find(f"fields at width {width} by {grow} and {layers} layers", config, find)


ConfigT = TypeVar("ConfigT", bound=StudyConfig)


@dataclass(frozen=True)
class PlannedStudy(Generic[ConfigT]):
    """The base of all kinds of study: a configuration, and the planner of its runs.

    Modules that analyze and report import scipy, which takes seconds, so a study imports them when
    it is analyzed, and not for its plan and its status. A telescope needs scipy for these too: the
    noise of losses decides which levels it has.
    """

    config: ConfigT

    @cached_property
    def planner(self) -> Planner:
        """The planner of the runs."""
        return Planner(self.config)

    @cached_property
    def facts(self) -> ModelFacts:
        """What the plan asks about models."""
        return ModelFacts(self.config.path / "plan.json")


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
                f"the runs {other.label!r} and {run.label!r} have the same configuration; leave "
                "one out"
            )
    return found
