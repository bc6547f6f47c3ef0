"""Reads recipes: YAML or JSON files, those shipped with the package, and saved configurations."""

from __future__ import annotations

import itertools
import json
import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from muonscale.errors import ConfigError, nearest, shown
from muonscale.lab.files import check_local, read_text

RECIPES = resources.files("muonscale") / "recipes"
SUFFIXES = (".yaml", ".yml", ".json")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two exceptions: 1e-6 is a number, and 10:15 is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
for _digit in "0123456789":  # YAML 1.1 reads 10:15 as a number of base 60
    _Loader.yaml_implicit_resolvers[_digit] = [
        ("tag:yaml.org,2002:str", re.compile(r"^\d+:\d+$")),
        *_Loader.yaml_implicit_resolvers[_digit],
    ]


def read_yaml(text: str) -> Any:
    """Return the value of YAML text.

    Raises:
        yaml.YAMLError: for text that is not YAML, or a value that does not fit its tag.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's constructors raise these for a tag or a date that does not fit its text.
        raise yaml.YAMLError(f"a value does not fit its type ({error})") from error


def shipped_names(shelf: Traversable) -> list[str]:
    """Return the names of the recipes in a folder of the package."""
    return sorted(item.name[:-5] for item in shelf.iterdir() if item.name.endswith(".yaml"))


def shipped_text(shelf: Traversable, name: str) -> str:
    """Return a shipped recipe as it is written."""
    return (shelf / f"{name}.yaml").read_text("utf-8")


def shipped_summary(shelf: Traversable, name: str) -> str:
    """Return the first paragraph of the comment that a shipped recipe begins with, as one line."""
    lines = shipped_text(shelf, name).splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("# "), lines)
    return " ".join(line.removeprefix("#").strip() for line in comment)


def is_file(name: str) -> bool:
    """Return whether a recipe is a file; text that cannot be a path is not a file."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def is_folder(name: str) -> bool:
    """Return whether a recipe is a folder; text that cannot be a path is not a folder."""
    try:
        return Path(name).is_dir()
    except OSError:
        return False


def _is_pipe(path: Path) -> bool:
    """Return whether a path is that of a pipe or a device, as of `<(...)` in a shell."""
    try:
        return path.exists() and not (path.is_file() or path.is_dir())
    except (OSError, ValueError):
        return False


def read_tree(name: str, what: str, shelf: Traversable, saved_as: str) -> dict[str, Any]:
    """Return the keys of a recipe as they are written.

    Args:
        name: a shipped recipe, a YAML or JSON file, or a folder that holds `saved_as`.
        what: `recipe` or `study`, for errors.
        shelf: folder of the shipped recipes.
        saved_as: file of a run or study folder that holds its configuration.

    Raises:
        ConfigError: if there is no such recipe, or it does not map keys to values.
    """
    check_local(name, what)
    names = shipped_names(shelf)
    path: Traversable = shelf / f"{name}.yaml"
    if name not in names:
        path = Path(name) / saved_as if is_folder(name) else Path(name)
        if path.suffix not in SUFFIXES:
            if _is_pipe(path):
                raise ConfigError(
                    f"{what} {name} is a pipe or a device, which can be read only once: write it "
                    "to a .yaml file first"
                )
            raise ConfigError(
                f"unknown {what} {shown(name)} ({nearest(name, names)}); give a name from "
                "`muonscale recipes`, a .yaml file, or the folder of an earlier run or study"
            )
    form = "JSON" if path.name.endswith(".json") else "YAML"
    try:
        text = read_text(path) if isinstance(path, Path) else path.read_text("utf-8")
        tree = json.loads(text) if form == "JSON" else read_yaml(text)
    except (yaml.YAMLError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{what} {path} is not valid {form}: {error}") from error
    except FileNotFoundError:
        folder = f"{name} is no folder of a run or study, since it has no {saved_as}"
        missing = folder if is_folder(name) else f"there is no file {name}"
        raise ConfigError(f"{what} {shown(name)} cannot be read: {missing}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} {shown(name)} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{what} {name} is {shown(tree, 80)}; it must map keys to values")
    return tree
