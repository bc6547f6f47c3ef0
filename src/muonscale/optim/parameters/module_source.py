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
def methods(kind: type) -> dict[str, ast.FunctionDef]:
    """Return the methods of a module's class by name, inherited ones too.

    `nn.Module`'s own are left out, and so is every method whose source is not at hand (typed into
    an interpreter, compiled, written in C).
    """
    found: dict[str, ast.FunctionDef] = {}
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            if isinstance(function, FunctionType) and name not in found:
                tree = function_tree(function)
                if tree is not None:
                    found[name] = tree if isinstance(value, staticmethod) else _with_self(tree)
    return found


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
