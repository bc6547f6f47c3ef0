"""What the keys of a run are: type, default and meaning, read from the source of the sections."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from muonscale.errors import ConfigError, nearest
from muonscale.lab.config import sections
from muonscale.lab.config.load import Config
from muonscale.lab.config.validate import section_in
from muonscale.optim import options

LITERALS = vars(sections) | vars(options)
"""The names of literals, among others, and what they stand for."""
PLAIN_TYPES = {
    "Positive": "a count, such as 1000, 512k or 10B",
    "BatchTokens": "a count, such as 8192, 512k or 512Ki",
    "Fraction": "0 to below 1",
    "Steps": "a fraction below 1, or steps",
    "Mark": "a fraction below 1, or tokens such as 1B",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "Path": "a path",
    "bool": "true | false",
}
"""How types are called on the command line."""


@dataclass(frozen=True)
class Key:
    """A key of a section."""

    name: str
    """With its section, such as `train.tokens`; of an item of a list, with N for its number."""
    types: tuple[str, ...]
    """The types or the values that are accepted."""
    default: str
    """The default as it is written, `required`, or a dash for null."""
    meaning: str


def find_keys(word: str | None = None) -> dict[str, list[Key]]:
    """Return keys by section.

    Args:
        word: a section, a key, or a part of the names of keys; all keys by default.

    Raises:
        ConfigError: if nothing has such a name.
    """
    keys = {section: list(keys_of(section)) for section in Config.model_fields}
    if word is None:
        return keys
    if word in keys:
        return {word: keys[word]}
    for matches in (lambda key: key.name == word, lambda key: word in key.name):
        found = {section: list(filter(matches, each)) for section, each in keys.items()}
        if any(found.values()):
            return {section: each for section, each in found.items() if each}
    hint = nearest(word, {*keys, *(key.name for each in keys.values() for key in each)})
    raise ConfigError(f"no section and no key is named {word}; {hint}")


def describe_keys(word: str | None = None, width: int = 80) -> str:
    """Return keys as text, `width` characters a line; arguments and errors as `find_keys`."""
    lines: list[str] = []
    for section, keys in find_keys(word).items():
        lines += ["", section_text(section)]
        for key in keys:
            types = " | ".join(PLAIN_TYPES.get(name, name) for name in key.types)
            default = "" if key.default == "-" else f"  (default: {key.default})"
            default = "  (required)" if key.default == "required" else default
            lines += [f"  {key.name}  {types}{default}"]
            lines += textwrap.wrap(
                key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines[1:])


def section_text(name: str) -> str:
    """Return the docstring of a section."""
    return inspect.cleandoc(section_in(Config.model_fields[name].annotation).__doc__ or "")


def keys_of(section: str) -> Iterator[Key]:
    """Yield the keys of a section, each followed by those of its items if it is a list."""
    yield from _keys(section_in(Config.model_fields[section].annotation), f"{section}.")


def _keys(section: type[BaseModel] | None, prefix: str) -> Iterator[Key]:
    assert section is not None
    read = _read_fields(section)
    for name, field in section.model_fields.items():
        annotation, meaning = read[name]
        yield Key(f"{prefix}{name}", _types(annotation), _default(field.default), meaning)
        if (item := section_in(field.annotation)) is not None:
            yield from _keys(item, f"{prefix}{name}.N.")


def _read_fields(section: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """Return (annotation, docstring) of every field, inherited ones included."""
    found: dict[str, tuple[str, str]] = {}
    for cls in reversed(section.__mro__):
        if cls not in sections.Section.__mro__ and inspect.getdoc(cls):
            found |= read_docstrings(cls)
    return found


def read_docstrings(cls: type) -> dict[str, tuple[str, str]]:
    """Return (annotation, docstring) of each attribute in the body of a class, by name.

    Python itself does not keep the docstrings of attributes. Both are on one line, and empty if the
    source has none.
    """
    body = _class_bodies(cls.__module__)[cls.__name__]
    found: dict[str, tuple[str, str]] = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        text = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else ""
        found[ast.unparse(target)] = annotation, " ".join(text.split())
    return found


@cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    """Return the bodies of the classes of a module, which is parsed once for all of them."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def _types(annotation: str) -> tuple[str, ...]:
    """Return the types as a user writes them. Names of literals are spelled out."""
    annotation = re.sub(
        r"\b\w+T\b",
        lambda m: str(LITERALS.get(m[0], m[0])).removeprefix("typing."),
        annotation,
    )
    annotation = re.sub(r"Literal\[Literal\[([^\]]*)\]", r"Literal[\1", annotation)
    values = re.sub(r"Literal\[([^\]]*)\]", lambda m: m[1].replace(", ", " | "), annotation)
    values = re.sub(r"Annotated\[(.*), Field\(.*?\)\]", r"\1", values)
    return tuple(re.split(r" \| (?![^\[]*\])", values.replace("'", "").replace(" | None", "")))


def _default(value: object) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "-"
    return "true" if value is True else "false" if value is False else str(value)
