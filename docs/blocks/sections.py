"""Sections of the configuration: keys, types and defaults, with what stands under them in the code."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from docs.blocks.markdown import code, table
from muonscale.lab.config import Config
from muonscale.lab.sections import BatchChange, Ingredient, Section, Stage
from muonscale.optim import options

PARTS: dict[str, dict[str, type[BaseModel]]] = {
    "data": {"an item of `data.mixture`": Ingredient},
    "schedule": {"an item of `schedule.stages`": Stage},
    "train": {"an item of `train.batch_schedule`": BatchChange},
}
"""Sections within a section, by what they are."""


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
    written = _written(section)
    rows = [
        [f"`{prefix}{name}`", _type(written[name][0]), _default(field.default), written[name][1]]
        for name, field in section.model_fields.items()
    ]
    return table(["key", "type", "default", "what it is"], rows)


def _written(section: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """Return annotation and docstring of every field, of the classes it inherits too."""
    found: dict[str, tuple[str, str]] = {}
    for cls in reversed(section.__mro__):
        if cls in Section.__mro__ or not inspect.getdoc(cls):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                told = isinstance(text, ast.Expr) and ast.literal_eval(text.value)
                said = " ".join(str(told).split()) if told else ""
                found[field.target.id] = ast.unparse(field.annotation), said
    return found


def _type(annotation: str) -> str:
    """Return the type as a reader writes it; names of literals in `options` are spelled out."""
    annotation = re.sub(
        r"\b\w+T\b",
        lambda m: str(getattr(options, m[0], m[0])).removeprefix("typing."),
        annotation,
    )
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
