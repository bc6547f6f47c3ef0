"""The resolved configuration of a run, and how a recipe and overrides become one.

A recipe is a YAML file of the sections of `Config`; `section.key=value` on the command line
overrides it. A `Config` is frozen. The run folder keeps it as `config.json`, which is a recipe too.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import model_validator

from muonscale.errors import ConfigError, nearest, shown
from muonscale.lab.config.overrides import assign, split_override
from muonscale.lab.config.read import (
    RECIPES,
    SUFFIXES,
    is_file,
    is_folder,
    read_tree,
    shipped_names,
    shipped_summary,
)
from muonscale.lab.config.run_length import Timeline
from muonscale.lab.config.sections import (
    AdapterSection,
    CheckpointSection,
    DataSection,
    EvalSection,
    LogSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    ProfileSection,
    RoutingSection,
    RunSection,
    ScheduleSection,
    Section,
    TelemetrySection,
    TrackSection,
    TrainSection,
    TransferSection,
)
from muonscale.lab.config.validate import keys_in, validate

# Keys that exclude each other: one on the command line replaces the recipe's others.
ALTERNATIVES = [
    ("data.source", "data.path", "data.mixture"),
    ("model.preset", "model.config", "model.weights"),
    ("train.tokens", "train.steps", "train.epochs"),
]

SHORTHAND = {"track": "track.to"}
"""Sections that may be given by their main key alone: `track=wandb`, and `track: wandb` in YAML."""


class Config(Section):
    """A resolved configuration."""

    run: RunSection
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    transfer: TransferSection = TransferSection()
    routing: RoutingSection = RoutingSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection
    parallel: ParallelSection = ParallelSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    telemetry: TelemetrySection = TelemetrySection()
    log: LogSection = LogSection()
    track: TrackSection = TrackSection()
    profile: ProfileSection = ProfileSection()

    @model_validator(mode="after")
    def _check_tokenizer(self) -> Config:
        if self.model.weights is not None and self.data.tokenizer is None:
            raise ValueError(
                f"model.weights={self.model.weights} needs data.tokenizer: its embeddings belong "
                "to the tokens of one tokenizer; the usual value is "
                f"data.tokenizer={self.model.weights}"
            )
        return self

    @model_validator(mode="after")
    def _check_transfer(self) -> Config:
        if self.model.weights is not None and self.transfer.base is not None:
            raise ValueError(
                f"transfer.base and model.weights={self.model.weights} exclude each other: "
                "transfer scales initial weights, and these are trained"
            )
        return self

    @model_validator(mode="after")
    def _check_adapter(self) -> Config:
        if self.adapter.rank is None:
            return self
        refused = {
            "model.weights=null: an adapter is trained on a checkpoint": self.model.weights is None,
            "optimizer.qk_clip: the clipped weights are frozen": self.optimizer.qk_clip is not None,
            f"parallel.tensor={self.parallel.tensor}": self.parallel.tensor > 1,
            f"parallel.expert={self.parallel.expert}": self.parallel.expert > 1,
        }
        for what, given in refused.items():
            if given:
                raise ValueError(f"adapter.rank={self.adapter.rank} excludes {what}")
        return self

    @model_validator(mode="after")
    def _check_sequences(self) -> Config:
        given = {
            "train.batch_tokens": self.train.batch_tokens,
            "train.micro_batch_tokens": self.train.micro_batch_tokens,
            "eval.batch_tokens": self.eval.batch_tokens,
        }
        for number, change in enumerate(self.train.batch_schedule):
            given[f"train.batch_schedule.{number}.batch_tokens"] = change.batch_tokens
        for key, tokens in given.items():
            if tokens is not None and tokens % self.data.sequence_length:
                length = self.data.sequence_length
                near = max(1, round(tokens / length)) * length
                raise ValueError(
                    f"{key}={tokens} is not a multiple of data.sequence_length={length}; {near} is"
                )
        return self

    @model_validator(mode="after")
    def _check_epochs(self) -> Config:
        if self.train.epochs is not None and self.data.mixture is not None:
            raise ValueError(
                f"train.epochs={self.train.epochs} needs one corpus, and data.mixture has "
                f"{len(self.data.mixture)}; give train.tokens"
            )
        if self.train.epochs is not None and self.data.stream:
            raise ValueError(
                f"train.epochs={self.train.epochs} needs the number of tokens, which is not known "
                f"at the start with data.stream=true; give train.tokens"
            )
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Config:
        if self.train.epochs is not None:  # checked once the tokens are known
            return self
        try:
            timeline = self.timeline
            ends = [0, *(timeline.step_at(s.until) for s in self.schedule.stages if s.until)]
        except ValueError as error:
            raise ValueError(f"train.batch_schedule: {error}") from error
        ends += [timeline.steps]
        if self.schedule.stages and any(end <= start for start, end in itertools.pairwise(ends)):
            raise ValueError(
                f"schedule.stages end at steps {', '.join(map(str, ends[1:]))} of {self.steps}: "
                "every stage needs at least one step"
            )
        return self

    @model_validator(mode="after")
    def _check_stage_weights(self) -> Config:
        known = self.data.weights
        for number, stage in enumerate(self.schedule.stages):
            given = stage.weights
            key = f"schedule.stages.{number}.weights"
            if given is None:
                continue
            if self.data.mixture is None:
                raise ValueError(f"{key} is given, and there is no data.mixture")
            for name in given:
                if name not in known:
                    raise ValueError(f"{key}: data.mixture has no {name!r}; {nearest(name, known)}")
            if not any(given.values()):
                raise ValueError(f"{key}: all weights are 0")
        return self

    @model_validator(mode="after")
    def _check_profile(self) -> Config:
        wanted = self.profile.step_range
        if (
            self.profile.steps is not None
            and self.train.epochs is None
            and not (wanted and wanted[-1] <= self.steps)
        ):
            raise ValueError(
                f"profile.steps={self.profile.steps} is not within the run's steps 1 to "
                f"{self.steps}; accepted: first:end with first < end <= {self.steps + 1}"
            )
        return self

    @property
    def timeline(self) -> Timeline:
        """The steps of the run and the sequences that each reads.

        Raises:
            ConfigError: if its length is given in epochs, see `with_tokens`.
        """
        if self.train.epochs is not None:
            raise ConfigError(
                f"train.epochs={self.train.epochs} is a number of steps only for `muonscale train`,"
                " which reads the corpus; give train.tokens"
            )
        train, length = self.train, self.data.sequence_length
        batch = train.batch_tokens // length
        if train.steps is not None:
            return Timeline.constant(train.steps, batch, length)
        assert train.tokens is not None
        changes = [(c.after, c.batch_tokens // length) for c in train.batch_schedule]
        return Timeline.changing(train.tokens, batch, changes, length)

    def with_tokens(self, sequences: int) -> Config:
        """Return this configuration with its epochs in tokens.

        Args:
            sequences: sequences of the training split.
        """
        assert self.train.epochs is not None
        tokens = max(1, round(self.train.epochs * sequences)) * self.data.sequence_length
        return resolve_values(self.model_dump(mode="json"), {"train.tokens": tokens})

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.timeline.steps


def _sections_of_keys() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for section, field in Config.model_fields.items():
        for key in keys_in(field.annotation):
            found.setdefault(key, []).append(section)
    return found


KEYS = _sections_of_keys()
"""From the name of a key to the sections that have one of this name."""


def recipe_names() -> list[str]:
    """Return the names of the recipes shipped with the package."""
    return shipped_names(RECIPES)


def recipe_summary(name: str) -> str:
    """Return what a shipped recipe trains, as one line."""
    return shipped_summary(RECIPES, name)


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Resolve a recipe and its overrides.

    Args:
        recipe: name of a shipped recipe, path of a YAML or JSON file, or a run folder.
        overrides: `section.key=value` strings. The value is read as YAML.

    Raises:
        ConfigError: for an unknown recipe, section or key, or a value of the wrong type or range.
    """
    return resolve_config(read_recipe(recipe), overrides)


def resolve_config(tree: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Resolve sections and their overrides; of two overrides of a key the last one counts.

    Args:
        tree: sections by name. It is changed.
        overrides: as for `load_config`.

    Raises:
        ConfigError: as `load_config`.
    """
    return resolve_values(tree, dict(parse_override(text) for text in overrides))


def resolve_values(tree: dict[str, Any], given: Mapping[str, Any]) -> Config:
    """Resolve sections and values by their keys `section.key`; `tree` is changed.

    Raises:
        ConfigError: as `load_config`.
    """
    for section, key in SHORTHAND.items():
        if section in tree and not isinstance(tree[section], dict):
            tree[section] = {key.removeprefix(f"{section}."): tree[section]}
    given = {SHORTHAND.get(name, name): value for name, value in given.items()}
    for keys in ALTERNATIVES:
        chosen = [key for key in keys if given.get(key) is not None]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} exclude each other; give one of them")
        for other in set(keys) - set(chosen) if chosen else ():
            section, key = other.split(".")
            tree.get(section, {}).pop(key, None)
    for name, value in given.items():
        assign(tree, name.split("."), value)
    return validate(Config, tree)


def read_recipe(recipe: str) -> dict[str, Any]:
    """Return the sections of a recipe as they are written, for `resolve_config`.

    Raises:
        ConfigError: if there is no such recipe, or it does not hold sections.
    """
    _refuse_data(recipe)
    tree = read_tree(recipe, "recipe", RECIPES, "config.json")
    for name, section in tree.items():
        if not isinstance(section, dict) and name not in SHORTHAND:
            raise ConfigError(
                f"recipe {recipe}: section {shown(name, 80)} is {shown(section, 80)}; it must hold "
                "`key: value` pairs"
            )
    if recipe not in recipe_names() and is_folder(recipe):
        if "run" not in tree:
            raise ConfigError(
                f"{recipe} is not a run folder: its config.json has no section `run`, only "
                f"{shown(sorted(map(str, tree)))}"
            )
        tree["run"]["path"] = recipe  # the folder may have been moved
    return tree


def _refuse_data(recipe: str) -> None:
    """Refuse a file or a folder of text, and say how to train on it."""
    path = Path(recipe)
    is_data = is_file(recipe) and path.suffix not in SUFFIXES
    if is_folder(recipe) and not (path / "config.json").exists():
        is_data = any(path.iterdir())
    if recipe not in recipe_names() and is_data:
        words = shlex.join([f"data.path={recipe}", f"run.path=runs/{path.stem}"])
        raise ConfigError(
            f"{shown(recipe)} is not a recipe and not the folder of a run; to train on the text "
            f"in it, write {words}"
        )


def parse_override(text: str) -> tuple[str, Any]:
    """Return the key and the value of an override. The value is read as YAML.

    Raises:
        ConfigError: if it does not have the form `section.key=value`, or is not YAML.
    """
    key, sign, _ = text.partition("=")
    if sign and key in KEYS:
        places = " or ".join(f"{section}.{key}" for section in KEYS[key])
        raise ConfigError(
            f"override {text!r} must have the form section.key=value; did you mean {places}?"
        )
    return split_override(text, "section.key=value", lambda key: "." in key or key in SHORTHAND)


def dump_config(config: Config) -> str:
    """Return the resolved configuration as JSON, readable as a recipe."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
