"""The resolved configuration of a run, and how a recipe and overrides become one.

A recipe is a YAML file of the sections of `Config`; `section.key=value` on the command line overrides it.
Nothing changes a `Config` after it is resolved: it is written to the run folder as `config.json`
and can be given back as a recipe.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError, model_validator

from muonscale.errors import ConfigError, nearest, shown
from muonscale.lab.config.run_length import Timeline
from muonscale.lab.config.sections import (
    CheckpointSection,
    DataSection,
    EvalSection,
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

# Keys that name the same thing in several ways: one on the command line replaces the recipe's others.
ALTERNATIVES = [
    ("data.source", "data.path", "data.mixture"),
    ("model.preset", "model.config", "model.weights"),
    ("train.tokens", "train.steps"),
]

SHORTHAND = {"track": "track.to"}
"""Sections that may be given by their main key alone: `track=wandb`, and `track: wandb` in YAML."""


class _Loader(yaml.SafeLoader):
    """YAML with numbers as people write them: 1e-6 is a number, not a string as YAML 1.1 has it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
for _digit in "0123456789":  # 10:15 is steps, and not a number of base 60 as YAML 1.1 has it
    _Loader.yaml_implicit_resolvers[_digit] = [
        ("tag:yaml.org,2002:str", re.compile(r"^\d+:\d+$")),
        *_Loader.yaml_implicit_resolvers[_digit],
    ]


def read_yaml(text: str) -> Any:
    """Return what YAML text says, numbers such as 1e-6 included.

    Raises:
        yaml.YAMLError: for text that is not YAML, or holds what no value can be made of.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What PyYAML's constructors raise for a tag or a date that does not fit its text.
        raise yaml.YAMLError(f"a value does not fit its type ({error})") from error


class Config(Section):
    """A resolved configuration."""

    run: RunSection
    model: ModelSection
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
    track: TrackSection = TrackSection()
    profile: ProfileSection = ProfileSection()

    @model_validator(mode="after")
    def _tokenizer_of_the_weights(self) -> Config:
        if self.model.weights is not None and self.data.tokenizer is None:
            raise ValueError(
                f"model.weights={self.model.weights} needs data.tokenizer: to its embeddings the "
                "tokens of a new tokenizer mean nothing; the usual value is "
                f"data.tokenizer={self.model.weights}"
            )
        return self

    @model_validator(mode="after")
    def _weights_to_scale(self) -> Config:
        if self.model.weights is not None and self.transfer.base is not None:
            raise ValueError(
                f"transfer.base is given, and model.weights={self.model.weights}: transfer scales the "
                "weights as they are drawn, and these are trained; leave out one of them"
            )
        return self

    @model_validator(mode="after")
    def _whole_sequences(self) -> Config:
        given = {
            "train.batch_tokens": self.train.batch_tokens,
            "train.micro_batch_tokens": self.train.micro_batch_tokens,
            "eval.batch_tokens": self.eval.batch_tokens,
        }
        for number, change in enumerate(self.train.batch_schedule):
            given[f"train.batch_schedule.{number}.batch_tokens"] = change.batch_tokens
        for key, tokens in given.items():
            if tokens is not None and tokens % self.data.sequence_length:
                raise ValueError(
                    f"{key}={tokens} is not a multiple of "
                    f"data.sequence_length={self.data.sequence_length}"
                    "; give a multiple of it"
                )
        return self

    @model_validator(mode="after")
    def _marks_in_order(self) -> Config:
        try:
            timeline = self.timeline
            ends = [0, *(timeline.step_at(s.until) for s in self.schedule.stages if s.until)]
        except ValueError as error:
            raise ValueError(f"train.batch_schedule: {error}") from error
        ends += [timeline.steps]
        if self.schedule.stages and any(end <= start for start, end in itertools.pairwise(ends)):
            raise ValueError(
                f"schedule.stages end at steps {', '.join(map(str, ends[1:]))} of {self.steps}: every "
                "stage needs at least one step"
            )
        return self

    @model_validator(mode="after")
    def _weights_of_the_mixture(self) -> Config:
        known = self.data.weights
        for number, stage in enumerate(self.schedule.stages):
            given = stage.weights
            key = f"schedule.stages.{number}.weights"
            if given is None:
                continue
            if self.data.mixture is None:
                raise ValueError(
                    f"{key} is given, and there is no data.mixture to weigh"
                    "; leave it out, or give data.mixture"
                )
            for name in given:
                if name not in known:
                    raise ValueError(f"{key}: no {name!r} in data.mixture; {nearest(name, known)}")
            if not any(given.values()):
                raise ValueError(f"{key}: all weights are 0; give one a weight above it")
        return self

    @model_validator(mode="after")
    def _profiled_steps(self) -> Config:
        wanted = self.profile.step_range
        if self.profile.steps is not None and not (wanted and wanted[-1] <= self.steps):
            raise ValueError(
                f"profile.steps={self.profile.steps} is not within the run's steps 1 to {self.steps}; "
                f"accepted: first:end with first < end <= {self.steps + 1}"
            )
        return self

    @property
    def timeline(self) -> Timeline:
        """The steps of the run and what each reads."""
        train, length = self.train, self.data.sequence_length
        batch = train.batch_tokens // length
        if train.steps is not None:
            return Timeline.constant(train.steps, batch, length)
        assert train.tokens is not None
        changes = [(c.after, c.batch_tokens // length) for c in train.batch_schedule]
        return Timeline.changing(train.tokens, batch, changes, length)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.timeline.steps


def recipe_names() -> list[str]:
    """Return the names of the recipes shipped with the package."""
    folder = resources.files("muonscale") / "recipes"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe_summary(name: str) -> str:
    """Return the first paragraph of the comment that a shipped recipe begins with, as one line."""
    return first_comment(_shipped(name))


def first_comment(text: str) -> str:
    """Return the first paragraph of the comment that YAML begins with, as one line."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), text.splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def _shipped(name: str) -> str:
    return (resources.files("muonscale") / "recipes" / f"{name}.yaml").read_text("utf-8")


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Resolve a recipe and its overrides.

    Args:
        recipe: name of a shipped recipe, path of a YAML or JSON file, or a run folder.
        overrides: `section.key=value` strings, the value read as YAML.

    Raises:
        ConfigError: for an unknown recipe, section or key, or a value of the wrong type or range.
    """
    return resolve_config(read_recipe(recipe), overrides)


def resolve_config(tree: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Resolve sections and their overrides; `tree` is written to.

    Raises:
        ConfigError: as `load_config`.
    """
    # Of one key the last one counts.
    return resolve_values(tree, dict(parse_override(text) for text in overrides))


def resolve_values(tree: dict[str, Any], given: Mapping[str, Any]) -> Config:
    """Resolve sections and values of keys `section.key`; `tree` is written to.

    Raises:
        ConfigError: as `load_config`.
    """
    for section, key in SHORTHAND.items():
        if section in tree and not isinstance(tree[section], dict):
            tree[section] = {key.removeprefix(f"{section}."): tree[section]}
    given = {SHORTHAND.get(name, name): value for name, value in given.items()}
    names = [name for name, value in given.items() if value is not None]
    for keys in ALTERNATIVES:
        chosen = [key for key in keys if key in names]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} exclude each other; give one of them")
        for other in set(keys) - set(chosen) if chosen else ():
            _drop(tree, other)
    for name, value in given.items():
        _assign(tree, name, value)
    return _validate(tree)


def read_recipe(recipe: str) -> dict[str, Any]:
    """Return the sections of a recipe as they are written, for `resolve_config`.

    Raises:
        ConfigError: if there is no such recipe, or it is not YAML of sections.
    """
    if recipe in recipe_names():
        text = _shipped(recipe)
    elif _is_folder(recipe):
        return _read_run(Path(recipe))
    elif Path(recipe).suffix in (".yaml", ".yml", ".json"):
        try:
            text = Path(recipe).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"recipe {shown(recipe)} cannot be read: {error}; give a YAML file of UTF-8 text"
            ) from error
    else:
        raise ConfigError(
            f"unknown recipe {shown(recipe)} ({nearest(recipe, recipe_names())}); "
            "a recipe is a name from `muonscale recipes`, a .yaml file, or a run folder"
        )
    try:
        tree = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"recipe {recipe} is not valid YAML: {error}"
            "; see what is written there, or put text with signs in quotes"
        ) from error
    return _sections(tree, f"recipe {recipe}")


def _is_folder(recipe: str) -> bool:
    try:
        return Path(recipe).is_dir()
    except OSError:  # a name that no file can have
        return False


def _sections(tree: Any, what: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{what} is {shown(tree, 80)}; it must map section names to `key: value` pairs"
        )
    for name, section in tree.items():
        if not isinstance(section, dict) and name not in SHORTHAND:
            raise ConfigError(
                f"{what}: section {shown(name, 80)} is {shown(section, 80)}; it must hold "
                "`key: value` pairs"
            )
    return tree


def _read_run(folder: Path) -> dict[str, Any]:
    """Return the configuration of a run, its path being where it is now."""
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{folder} is not a run folder: {error}; give one that holds the config.json that training "
            "wrote"
        ) from error
    tree = _sections(tree, f"{folder} is not a run folder: its config.json")
    if "run" not in tree:
        raise ConfigError(
            f"{folder} is not a run folder: its config.json has no section `run`, only "
            f"{shown(sorted(map(str, tree)))}; give the folder that training wrote"
        )
    tree["run"]["path"] = str(folder)
    return tree


def parse_override(text: str) -> tuple[str, Any]:
    """Return the key and the value, read as YAML, of an override.

    Raises:
        ConfigError: if it has not the form `section.key=value`, or is not YAML.
    """
    name, sign, value = text.partition("=")
    if not sign or ("." not in name and name not in SHORTHAND):
        raise ConfigError(f"override {text!r} must have the form section.key=value")
    try:
        return name, read_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of override {text!r} is not valid YAML: {error}"
            "; put text with signs in quotes"
        ) from error


def _assign(tree: Any, name: str, value: Any) -> None:
    *parents, leaf = name.split(".")
    for part in parents:
        tree = _item(tree, part, name) if isinstance(tree, list) else tree.setdefault(part, {})
        if not isinstance(tree, dict | list):
            raise ConfigError(
                f"override {name}: {part} is a value, not a section; give a key of a section"
            )
    if isinstance(tree, list):
        _item(tree, leaf, name)
        tree[int(leaf)] = value
    else:
        tree[leaf] = value


def _item(items: list[Any], number: str, name: str) -> Any:
    """Return the item of a list that an override names."""
    if not number.isdecimal() or int(number) >= len(items):
        raise ConfigError(
            f"override {name}: {number} is none of the {len(items)} items there, counted from 0"
            "; give the number of one of them"
        )
    return items[int(number)]


def _drop(tree: dict[str, Any], name: str) -> None:
    section, key = name.split(".")
    tree.get(section, {}).pop(key, None)


def _validate(tree: dict[str, Any]) -> Config:
    refuse_odd_text(tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(item) for item in error.errors())) from None


def refuse_odd_text(tree: Any, place: str = "") -> None:
    """Refuse text that no file, path or console can hold.

    Raises:
        ConfigError: for a NUL or half a surrogate pair in a key or a value, with its place.
    """
    if isinstance(tree, str) and ("\0" in tree or any("\ud800" <= c <= "\udfff" for c in tree)):
        raise ConfigError(
            f"{place or 'a key'}={shown(tree)} has a NUL or a lone surrogate in it, which is no "
            "character; leave it out"
        )
    if isinstance(tree, dict):
        for key, value in tree.items():
            refuse_odd_text(key)
            refuse_odd_text(value, f"{place}.{key}" if place else str(key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            refuse_odd_text(value, f"{place}.{number}")


def _sentence(item: Any) -> str:
    """Turn one pydantic error into a sentence with the key, the value and what is accepted."""
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        *parents, key = (str(part) for part in item["loc"])
        model: Any = Config
        for part in parents:
            model = model if part.isdecimal() else _section(model.model_fields[part].annotation)
        return f"unknown key {name}; {nearest(key, model.model_fields)}"
    if item["type"] == "missing":
        return f"{name} is required; give it in the recipe or as {name}=VALUE"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return message
    return f"{name}={shown(item['input'])}: {message}"


def _section(annotation: Any) -> Any:
    """Return the section that an annotation holds: alone, in a list, or with None beside it."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)


def dump_config(config: Config) -> str:
    """Return the resolved configuration as JSON, readable as a recipe."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
