"""Overrides, `key=value` on the command line: how one is read and put into a tree."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import yaml

from muonscale.errors import ConfigError
from muonscale.lab.config.read import read_yaml


def split_override(text: str, form: str, accepts: Callable[[str], bool]) -> tuple[str, Any]:
    """Return the key and the value of an override; a value is YAML, unless it begins with `*`.

    Args:
        text: the override.
        form: the form that it must have, for errors.
        accepts: whether a key has this form.

    Raises:
        ConfigError: if the text has another form, or the value is not YAML.
    """
    key, sign, value = text.partition("=")
    if not sign or not accepts(key):
        raise ConfigError(f"override {text!r} must have the form {form}")
    if value.startswith("*"):  # a pattern of files; in YAML an alias, which no override can define
        return key, value
    try:
        found = read_yaml(value)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the value of override {text!r} is not valid YAML: {reason}; text with special "
            "characters needs quotes"
        ) from error
    if isinstance(found, str) and _loses_characters(value, found):
        raise ConfigError(
            f"the value of override {text!r} is read as {found!r}, since YAML drops comments, line "
            f"breaks and spaces; write it in double quotes: {key}={shlex.quote(json.dumps(value))}"
        )
    return key, found


def _loses_characters(text: str, value: str) -> bool:
    """Return whether text that YAML reads as a string is another one, such as another path."""
    if text[:1] in ("|", ">"):
        return False
    quoted = text[:1] in ("'", '"', "!", "&")
    return len(text.splitlines()) > 1 if quoted else text != value


def assign(tree: Any, names: list[str], value: Any) -> None:
    """Set the value at a path of keys and item numbers; missing sections are added.

    Raises:
        ConfigError: if the path leads through a value, or to an item that a list does not have.
    """
    key = ".".join(names)
    for name in names[:-1]:
        if isinstance(tree, dict):
            tree.setdefault(name, {})
        tree = tree[_place(tree, name, key)]
        if not isinstance(tree, dict | list):
            raise ConfigError(f"override {key}: {name} is a value, and has no keys")
    tree[_place(tree, names[-1], key)] = value


def _place(tree: Any, name: str, key: str) -> Any:
    if isinstance(tree, dict):
        return name
    if not name.isdecimal() or int(name) >= len(tree):
        raise ConfigError(
            f"override {key}: {name} is none of the {len(tree)} items, which are counted from 0"
        )
    return int(name)
