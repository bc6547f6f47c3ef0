"""Sections of the configuration: the key, type, default and docstring of each field."""

from __future__ import annotations

import inspect
import re

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from docs.blocks.docstrings import read_docstrings
from docs.blocks.markdown import code, table
from muonscale.lab.config import sections as config_sections
from muonscale.lab.config.load import Config
from muonscale.lab.config.sections import BatchChange, Ingredient, Section, Stage
from muonscale.optim import options

PARTS: dict[str, dict[str, type[BaseModel]]] = {
    "data": {"an item of `data.mixture`": Ingredient},
    "schedule": {"an item of `schedule.stages`": Stage},
    "train": {"an item of `train.batch_schedule`": BatchChange},
}
"""Models inside a section, by title."""

LITERALS = vars(config_sections) | vars(options)
"""The names of literals, among others, and what they stand for."""


def sections() -> str:
    """Return every section as a table."""
    lines = []
    for name, found in Config.model_fields.items():
        assert isinstance(found.annotation, type) and issubclass(found.annotation, BaseModel)
        lines += [f"## `{name}`", _text(found.annotation), _keys(found.annotation, f"{name}.")]
        for title, part in PARTS.get(name, {}).items():
            lines += [f"{title[0].upper()}{title[1:]}:", _keys(part, "")]
    return "\n\n".join(lines)


def _text(section: type[BaseModel]) -> str:
    return inspect.cleandoc(section.__doc__ or "")


def _keys(section: type[BaseModel], prefix: str) -> str:
    read = _read_fields(section)
    rows = [
        [f"`{prefix}{name}`", _type(read[name][0]), _default(field.default), read[name][1]]
        for name, field in section.model_fields.items()
    ]
    return table(["key", "type", "default", "what it is"], rows)


def _read_fields(section: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """Return (annotation, docstring) of every field, inherited ones included."""
    found: dict[str, tuple[str, str]] = {}
    for cls in reversed(section.__mro__):
        if cls not in Section.__mro__ and inspect.getdoc(cls):
            found |= read_docstrings(cls)
    return found


def _type(annotation: str) -> str:
    """Return the type as a user writes it. Names of literals are spelled out."""
    annotation = re.sub(
        r"\b\w+T\b",
        lambda m: str(LITERALS.get(m[0], m[0])).removeprefix("typing."),
        annotation,
    )
    annotation = re.sub(r"Literal\[Literal\[([^\]]*)\]", r"Literal[\1", annotation)
    values = re.sub(r"Literal\[([^\]]*)\]", lambda m: m[1].replace(", ", " | "), annotation)
    values = re.sub(r"Annotated\[(.*), Field\(.*?\)\]", r"\1", values)
    parts = values.replace("'", "").replace(" | None", "")
    return ", ".join(map(code, re.split(r" \| (?![^\[]*\])", parts)))


def _default(value: object) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "-"
    if isinstance(value, BaseModel):
        return "as below"
    text = "true" if value is True else "false" if value is False else str(value)
    return code(text)
