"""Every place in src that makes an error a user reads, found in the syntax tree.

A site is a statement that calls one of the classes of muonscale.errors, or ValueError, which only
code that pydantic calls raises: pydantic puts its text into the sentence of a ConfigError.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import muonscale
from muonscale import errors

SRC = Path(muonscale.__file__).parent
CLASSES = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, Exception)}


@dataclass(frozen=True)
class Site:
    module: str
    """Path below the package."""
    first: int
    last: int
    """Lines of the statement."""
    kind: str
    message: str
    """Source of the message."""
    is_constant: bool
    """Whether the message is text alone, with no value put in."""


def all_sites() -> list[Site]:
    paths = [path for path in sorted(SRC.rglob("*.py")) if path.name != "errors.py"]
    return [site for path in paths for site in _sites_of(path)]


def _sites_of(path: Path) -> Iterator[Site]:
    module = path.relative_to(SRC).as_posix()
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(statement, ast.Raise | ast.Return | ast.Assign):
            continue
        for call in ast.walk(statement):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            kind = call.func.id if isinstance(call.func, ast.Name) else ""
            if kind in CLASSES | {"ValueError"}:
                message = call.args[0]
                is_constant = all(
                    isinstance(n, ast.Constant | ast.JoinedStr) for n in ast.walk(message)
                )
                last = statement.end_lineno or statement.lineno
                yield Site(module, statement.lineno, last, kind, ast.unparse(message), is_constant)
