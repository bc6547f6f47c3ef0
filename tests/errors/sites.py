"""Every place in src that makes an error a user reads, found in the syntax tree.

A site is a call of one of the classes of muonscale.errors, or of ValueError where pydantic hands the
text on. Its message is the text that is written there, with names that stand for text resolved in
the same module.
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
# Modules of configuration: pydantic turns a ValueError in them into the sentence of a ConfigError.
PYDANTIC = {
    "lab/config.py", "lab/sections.py", "lab/watching_sections.py", "lab/timeline.py", "lab/studies/sections.py", "lab/studies/batch.py",
    "lab/studies/compare.py", "lab/studies/frontier_config.py", "lab/studies/scaling_config.py",
    "lab/studies/telescope_config.py", "lab/studies/transfer.py",
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    module: str
    """Path below the package."""
    function: str
    first: int
    last: int
    """Lines of the statement."""
    kind: str
    text: str
    """The message, with {expression} for what is put in."""

    @property
    def key(self) -> str:
        """What names it when lines move: module, function, and the first words of the message."""
        return f"{self.module}:{self.function}: {' '.join(self.text.split())[:40]}"


def all_sites() -> list[Site]:
    return [site for path in sorted(SRC.rglob("*.py")) for site in _sites_of(path)]


def _sites_of(path: Path) -> Iterator[Site]:
    module = path.relative_to(SRC).as_posix()
    if module == "errors.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted = CLASSES | ({"ValueError"} if module in PYDANTIC else set())
    for function, statement in _statements(tree):
        for call in _calls(statement):
            name = call.func.id if isinstance(call.func, ast.Name) else ""
            if name in wanted and call.args:
                message = _Message(tree, function)
                text = message.of(call.args[0])
                where = function.name if function is not None else ""
                yield Site(module, where, statement.lineno, statement.end_lineno or 0, name, text)


def _statements(
    tree: ast.AST, inside: ast.FunctionDef | None = None
) -> Iterator[tuple[ast.FunctionDef | None, ast.stmt]]:
    """Yield the statements that hold no others, with the function they are in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield from _statements(node, node)
        elif isinstance(node, ast.Raise | ast.Return | ast.Assign):
            yield inside, node
        else:
            yield from _statements(node, inside)


def _calls(statement: ast.stmt) -> list[ast.Call]:
    return [node for node in ast.walk(statement) if isinstance(node, ast.Call)]


class _Message:
    """Text of an expression; names are looked up in the function, then in the module."""

    def __init__(self, tree: ast.Module, function: ast.FunctionDef | None) -> None:
        self.tree, self.function, self.depth = tree, function, 0

    def of(self, node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(self.of, node.values))
        if isinstance(node, ast.FormattedValue):
            return "{" + ast.unparse(node.value) + "}" + self._looked_up(node.value)
        if isinstance(node, ast.BinOp | ast.IfExp | ast.BoolOp | ast.GeneratorExp | ast.ListComp):
            return "".join(self.of(child) for child in ast.iter_child_nodes(node))
        if isinstance(node, ast.Call):
            inner = "".join(self.of(argument) for argument in node.args)
            return "{" + ast.unparse(node) + "}" + inner + self._looked_up(node.func)
        if isinstance(node, ast.Name):
            return "{" + node.id + "}" + self._looked_up(node)
        return ""

    def _looked_up(self, node: ast.AST) -> str:
        """Return the text that a name stands for, or that a function here returns."""
        if not isinstance(node, ast.Name) or self.depth > 2:
            return ""
        found: list[ast.AST] = []
        for scope in (self.function, self.tree):
            for item in ast.walk(scope) if scope is not None else ():
                if isinstance(item, ast.Assign) and node.id in map(ast.unparse, item.targets):
                    found.append(item.value)
                if isinstance(item, ast.FunctionDef) and item.name == node.id:
                    found += [
                        r.value for r in ast.walk(item) if isinstance(r, ast.Return) and r.value
                    ]
            if found:
                break
        self.depth += 1
        text = "".join(map(self.of, found))
        self.depth -= 1
        return text
