"""The kinds of study, and how a recipe becomes one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from muonscale.errors import ConfigError, nearest, shown
from muonscale.lab.config.load import first_comment, read_yaml, refuse_odd_text
from muonscale.lab.studies.batch.config import BatchConfig
from muonscale.lab.studies.batch.study import BatchStudy
from muonscale.lab.studies.compare.config import CompareConfig
from muonscale.lab.studies.compare.study import CompareStudy
from muonscale.lab.studies.config import StudyConfig
from muonscale.lab.studies.scaling.config import ScalingConfig
from muonscale.lab.studies.scaling.study import ScalingStudy
from muonscale.lab.studies.study import Study
from muonscale.lab.studies.telescope.config import TelescopeConfig
from muonscale.lab.studies.telescope.study import TelescopeStudy
from muonscale.lab.studies.transfer.config import TransferConfig
from muonscale.lab.studies.transfer.study import TransferStudy

KINDS: dict[str, tuple[type[StudyConfig], Callable[[Any], Study]]] = {
    "compare": (CompareConfig, CompareStudy),
    "transfer": (TransferConfig, TransferStudy),
    "scaling": (ScalingConfig, ScalingStudy),
    "batch": (BatchConfig, BatchStudy),
    "telescope": (TelescopeConfig, TelescopeStudy),
}
"""Configuration and class by the value of `study`."""

NESTED = ("executor", "frontier", "set")
"""Keys that hold other keys, even where the recipe leaves them out."""


def study_names() -> list[str]:
    """Return the names of the study recipes shipped with the package."""
    folder = resources.files("muonscale") / "recipes" / "studies"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def study_summary(name: str) -> str:
    """Return the first comment of a shipped study, which describes it."""
    return first_comment(_shipped(name))


def _shipped(name: str) -> str:
    folder = resources.files("muonscale") / "recipes" / "studies"
    return (folder / f"{name}.yaml").read_text("utf-8")


def load_study(recipe: str, overrides: Sequence[str] = ()) -> Study:
    """Return the study of a recipe.

    Args:
        recipe: name of a shipped study, path of a YAML or JSON file, or a study folder.
        overrides: `key=value`, the value read as YAML; `set.train.tokens=...` for keys of runs.

    Raises:
        ConfigError: for an unknown recipe or key, or a value of the wrong type or range.
    """
    tree = _read(recipe)
    for text in overrides:
        _override(tree, text)
    kind = tree.get("study")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(
            f"{recipe}: study={shown(kind)} is no kind of study; {nearest(kind, KINDS)}"
        )
    config, study = KINDS[kind]
    return study(_validated(config, tree))


def command_of(config: StudyConfig) -> str:
    """Return the command that does a study: by its name, if it comes with the package."""
    for name in study_names():
        if load_study(name, [f"path={json.dumps(str(config.path))}"]).config == config:
            return f"muonscale study run {name}"
    return f"muonscale study run {config.path}"


def _read(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if recipe in study_names():
        text = _shipped(recipe)
        path = Path(f"{recipe}.yaml")
    else:
        if path.is_dir():
            path = path / "study.json"
        if path.suffix not in (".yaml", ".yml", ".json"):
            raise ConfigError(
                f"unknown study {recipe!r} ({nearest(recipe, study_names())}); a study is a name from "
                "`muonscale recipes`, a .yaml file, or a study folder"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"study {shown(recipe)} cannot be read: {error}; give a YAML file of UTF-8 text"
            ) from error
    try:
        tree = json.loads(text) if path.suffix == ".json" else read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"study {recipe} is not valid YAML: {error}"
            "; see what is written there, or put text with signs in quotes"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"study {recipe} is {shown(tree, 80)}; it must map keys to values")
    return tree


def _override(tree: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    section, dot, inner = key.partition(".")
    if (
        not sign
        or not key
        or (dot and section not in NESTED and not isinstance(tree.get(section), dict))
    ):
        raise ConfigError(
            f"override {text!r} must have the form key=value, or that of a key in a key such as "
            "executor.key=value; keys of the runs are set.section.key=value"
        )
    try:
        found = read_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of override {text!r} is not valid YAML: {error}"
            "; put text with signs in quotes"
        ) from error
    # Keys of `set` are keys of a recipe, which have a dot themselves.
    names = ["set", inner] if section == "set" and dot else key.split(".")
    for place, name in enumerate(names[:-1], 1):
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"override {text!r}: {'.'.join(names[:place])} holds no keys; give a key that does"
            )
    tree[names[-1]] = found


def _validated(cls: type[StudyConfig], tree: dict[str, Any]) -> StudyConfig:
    refuse_odd_text(tree)
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(cls, item) for item in error.errors())) from None


def _sentence(cls: type[StudyConfig], item: Any) -> str:
    """Turn one pydantic error into a sentence with the key, the value and what is accepted."""
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        *parents, key = (str(part) for part in item["loc"])
        known: Any = cls
        for part in parents:
            known = (
                _keys_of(known.model_fields[part].annotation)
                if part in known.model_fields
                else known
            )
        return f"unknown key {name}; {nearest(key, known.model_fields)}"
    if item["type"] == "missing":
        return f"{name} is required; give it in the recipe or as {name}=VALUE"
    message = item["msg"].removeprefix("Value error, ")
    return message if item["type"] == "value_error" else f"{name}={shown(item['input'])}: {message}"


def _keys_of(annotation: Any) -> Any:
    """Return the section that an annotation is, or that a mapping of names to sections holds."""
    return get_args(annotation)[-1] if get_args(annotation) else annotation
