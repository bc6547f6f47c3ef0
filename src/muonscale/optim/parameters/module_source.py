"""The source code of a module's methods, as syntax trees.

What a module declares does not say how it uses a parameter that it holds itself, nor which of its
layers comes last. Its code does. The code is parsed, never run.
"""

from __future__ import annotations

import ast
import copy
import inspect
import linecache
import sys
from functools import cache
from types import FunctionType
from typing import NamedTuple

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

PARALLEL = (DataParallel, DistributedDataParallel)
WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""What a compiled and a checkpointed module call their original; no part of a parameter's name."""


class Method(NamedTuple):
    """The definition of a method."""

    tree: ast.FunctionDef
    """Its first argument is called `self`, except for a static method."""
    owner: type
    """The class that defines it."""
    is_static: bool

    @property
    def arguments(self) -> list[str]:
        """The names of its arguments, without `self`."""
        names = [argument.arg for argument in self.tree.args.args]
        return names if self.is_static else names[1:]


@cache
def method(kind: type, name: str, after: type | None = None) -> Method | None:
    """Return a method of a module's class, or one that it inherits.

    Args:
        kind: a subclass of `nn.Module`.
        name: of the method, or of a property.
        after: the class whose `super()` is meant.

    Returns:
        None for `nn.Module`'s own methods, and for one whose source is not at hand (typed into an
        interpreter, compiled, written in C).
    """
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    for base in bases[bases.index(after) + 1 :] if after in bases else bases:
        if name in vars(base):
            value = vars(base)[name]
            is_static = isinstance(value, staticmethod)
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            function = inspect.unwrap(function) if callable(function) else None
            tree = function_tree(function) if isinstance(function, FunctionType) else None
            if tree is None:
                return None
            return Method(tree if is_static else _with_self(tree), base, is_static)
    return None


def methods(kind: type) -> dict[str, Method]:
    """Return all methods of a module's class that `method` finds, by name."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    names = dict.fromkeys(name for base in bases for name in vars(base))
    return {name: found for name in names if (found := method(kind, name)) is not None}


def function_beside(kind: type, name: str) -> ast.FunctionDef | None:
    """Return a function of a file in which the class, or one of its bases, is defined."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        module = sys.modules.get(base.__module__)
        function = inspect.unwrap(f) if callable(f := getattr(module, name, None)) else None
        if isinstance(function, FunctionType):
            return function_tree(function)
    return None


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


@cache
def names_in_transformers(kind: type) -> list[str]:
    """Return the names of transformers' classes among a class and its bases, its own first."""
    homes = ("transformers", "transformers_modules")
    return [c.__name__ for c in kind.__mro__ if c.__module__.split(".")[0] in homes]
