"""Where the value of an expression comes from, and which of its axes hold features.

Shapes are not known. An axis is counted from the end. The sizes that a tensor is viewed with are
taken for features or not by their words: `self.num_heads` is, `seq_len` is not.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace

from tests.optim.parameters.transformers_scan.source import Part

FEATURE_LIKE = re.compile(
    r"head|hidden|embed|dim|group|channel|feature|self\.|_size|num_|expert", re.I
)
BATCH_LIKE = re.compile(
    r"batch|bsz|seq|len|shape|token|point|quer|level|image|height|width|window|patch|frame|time"
    r"|\b(bs|b|B|N|t|T|L|H|W)\b"
)


@dataclass(frozen=True)
class Origin:
    """A layer's output or a parameter, as it reaches an expression."""

    cls: str
    attribute: str
    kind: str
    """"output" or "parameter"."""
    axes: tuple[int, ...] = (-1,)
    """Of an output: axes that hold its features, counted from the end."""
    rank: int = 3
    form: str = ""
    """Sizes that its features were viewed as, or what was done to a parameter."""
    part: bool = False
    unsure: bool = False
    """Whether its axis 1 may be the last one: the rank of a layer's output is not known."""
    swapped: bool = False
    """Of a parameter: whether its last two axes were exchanged."""


@dataclass(frozen=True)
class Value:
    origins: frozenset[Origin] = frozenset()
    items: tuple[Value, ...] | None = None
    sizes: tuple[ast.expr, ...] | None = None
    """Of a tuple of sizes: its expressions."""
    module: tuple[tuple[str, Part], ...] = ()
    """Of a module: its path in the class, and what it is."""

    def __or__(self, other: Value) -> Value:
        if other is EMPTY or other is self:
            return self
        if self is EMPTY:
            return other
        items = self.items
        if items is None or other.items is None or len(items) != len(other.items):
            items = items if not other.items else other.items if not items else None
        else:
            items = tuple(a | b for a, b in zip(items, other.items, strict=True))
        return Value(
            self.origins | other.origins,
            items,
            self.sizes or other.sizes,
            tuple(dict.fromkeys((*self.module, *other.module))),
        )

    def all_origins(self) -> frozenset[Origin]:
        inner = (item.all_origins() for item in self.items or ())
        return self.origins.union(*inner)


EMPTY = Value()


def outputs_in(value: Value) -> frozenset[Origin]:
    return frozenset(o for o in value.all_origins() if o.kind == "output")


def parameters_in(value: Value) -> list[Origin]:
    return [o for o in value.all_origins() if o.kind == "parameter"]


def unstarred(node: ast.expr) -> ast.expr:
    return node.value if isinstance(node, ast.Starred) else node


def text_of(node: ast.AST) -> str:
    return ast.unparse(node)


def is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def integer(node: ast.expr | None, default: int | None = 0) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        return -node.operand.value  # type: ignore[operator]
    if isinstance(node, (ast.Tuple, ast.List)) and len(node.elts) == 1:
        return integer(node.elts[0], default)
    return default  # type: ignore[return-value]


def axis_of(origin: Origin, dim: int) -> int:
    return dim if dim < 0 else dim - origin.rank


def swap(origin: Origin) -> Origin:
    if origin.kind == "parameter":
        return replace(origin, swapped=not origin.swapped)
    return transpose(origin, -1, -2)


def transpose(origin: Origin, a: int, b: int) -> Origin:
    if origin.kind == "parameter":
        return replace(origin, swapped=not origin.swapped)
    a, b = axis_of(origin, a), axis_of(origin, b)
    swapped = {a: b, b: a}
    return replace(origin, axes=tuple(swapped.get(axis, axis) for axis in origin.axes))


def permute(origin: Origin, order: list[int | None]) -> Origin:
    if origin.kind == "parameter":
        return replace(origin, form=f"{origin.form} permuted".strip())
    rank = len(order)
    if None in order or len(set(order)) != rank:
        return origin
    positions = [dim if dim < 0 else dim - rank for dim in order if dim is not None]
    axes = tuple(positions.index(axis) - rank for axis in origin.axes if axis in positions)
    return replace(origin, axes=axes, rank=rank)


def unsqueeze(origin: Origin, dim: int) -> Origin:
    if origin.kind == "parameter":
        return origin
    new = dim if dim < 0 else dim - origin.rank - 1
    axes = tuple(axis - 1 if axis <= new else axis for axis in origin.axes)
    return replace(origin, axes=axes, rank=origin.rank + 1)


def drop(origin: Origin, dim: int) -> Origin:
    """Return the origin without one axis."""
    if origin.kind == "parameter":
        return origin
    gone = axis_of(origin, dim)
    axes = tuple(axis + 1 if axis < gone else axis for axis in origin.axes if axis != gone)
    return replace(origin, axes=axes, rank=max(origin.rank - 1, 1))


def flatten(origin: Origin, start: int, end: int) -> Origin:
    if origin.kind == "parameter":
        return origin
    start, end = axis_of(origin, start), axis_of(origin, end)
    gone = end - start
    merged = any(start <= axis <= end for axis in origin.axes)
    axes = {axis for axis in origin.axes if axis > end}
    axes |= {axis + gone for axis in origin.axes if axis < start}
    if merged:
        axes.add(end)
    return replace(origin, axes=tuple(sorted(axes)), rank=origin.rank - gone)


def unflatten(origin: Origin, dim: int, sizes: list[ast.expr]) -> Origin:
    if origin.kind == "parameter":
        return replace(origin, form=f"{origin.form} viewed".strip())
    axis = axis_of(origin, dim)
    more = len(sizes) - 1
    if axis not in origin.axes or more < 1:
        return replace(origin, rank=origin.rank + max(more, 0))
    axes = {a for a in origin.axes if a > axis} | {a - more for a in origin.axes if a < axis}
    axes |= {axis - i for i in range(more + 1)}
    form = ", ".join(map(text_of, sizes))
    return replace(origin, axes=tuple(sorted(axes)), rank=origin.rank + more, form=form)


def view(origin: Origin, sizes: list[ast.expr]) -> Origin:
    if origin.kind == "parameter":
        text = ", ".join(map(text_of, sizes))
        return replace(origin, form=f"{origin.form} viewed as ({text})".strip())
    first = integer(sizes[0], 0) if sizes and isinstance(sizes[0], ast.Constant) else 0
    if first > 1 and -origin.rank in origin.axes and len(origin.axes) > 1:
        # What was brought to the front stays there: (3, batch * heads, sequence, head_dim).
        form = f"{first}, ..., {text_of(sizes[-1])}"
        return replace(origin, axes=(-len(sizes), -1), rank=len(sizes), form=form)
    features: list[ast.expr] = []
    starred = any(isinstance(size, ast.Starred) for size in sizes)  # it stands for two sizes
    for position, size in reversed(list(enumerate(sizes, start=int(starred)))):
        if features and not _is_feature(size, position):
            break
        features.insert(0, size)
    rank = sum(2 if isinstance(size, ast.Starred) else 1 for size in sizes)
    count = max(len(features), 1)
    form = ", ".join(map(text_of, features)) if count > 1 else ""
    axes = tuple(range(-count, 0))
    return replace(origin, axes=axes, rank=max(rank, 1), form=form)


def _is_feature(size: ast.expr, position: int) -> bool:
    """Return whether a size that a tensor is viewed with is one of its features, by its words."""
    if isinstance(size, ast.Starred) or position == 0:
        return False
    text = text_of(size)
    if isinstance(size, ast.Constant) and isinstance(size.value, int):
        return size.value > 1
    if text == "-1":
        return position > 1
    if BATCH_LIKE.search(text) and not re.search(r"head|dim", text):
        return False
    return bool(FEATURE_LIKE.search(text)) or len(text) <= 2
