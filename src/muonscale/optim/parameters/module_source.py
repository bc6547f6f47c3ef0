"""The source code of a module's methods, as syntax trees.

Nothing a module declares tells how it uses a parameter that it holds by itself, or which of its
layers comes last. Its code does. It is read, never run.
"""

from __future__ import annotations

import ast
import copy
import inspect
import linecache
from functools import cache
from types import FunctionType

from torch import nn


@cache
def method(kind: type, name: str) -> ast.FunctionDef | None:
    """Return a method of a module's class, or one that it inherits; its first argument is `self`.

    None for `nn.Module`'s own methods, and for one whose source is not at hand (typed into an
    interpreter, compiled, written in C).
    """
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if name in vars(base):
            value = vars(base)[name]
            function = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            tree = function_tree(function) if isinstance(function, FunctionType) else None
            return tree if tree is None or isinstance(value, staticmethod) else _with_self(tree)
    return None


def methods(kind: type) -> dict[str, ast.FunctionDef]:
    """Return all methods of a module's class that `method` finds, by name."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    names = dict.fromkeys(name for base in bases for name in vars(base))
    return {name: tree for name in names if (tree := method(kind, name)) is not None}


def _with_self(tree: ast.FunctionDef) -> ast.FunctionDef:
    """Return a method whose first argument is called `self`."""
    first = tree.args.args[0].arg if tree.args.args else "self"
    if first == "self":
        return tree
    tree = copy.deepcopy(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == first:
            node.id = "self"
    tree.args.args[0].arg = "self"
    return tree


@cache
def function_tree(function: FunctionType) -> ast.FunctionDef | None:
    """Return the definition of `function`, or None if its source is not at hand."""
    code = function.__code__
    return _definitions(code.co_filename).get((code.co_name, code.co_firstlineno))


@cache
def _definitions(file: str) -> dict[tuple[str, int], ast.FunctionDef]:
    """Return the functions defined in `file`, by name and first line, as their code has them."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return {}
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name, first] = node
    return found
