"""Which logical matrices a parameter holds, and how they are stored in it.

A logical matrix is `(out, in)`, as in `y = W @ x`. A parameter may hold its transpose, several
matrices stacked or woven along `out`, one for each attention head, or a whole stack `[E, out, in]`
of them. `view` gives the matrices of a tensor with the parameter's shape, `unview` puts such
matrices back into the stored form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from muonscale.errors import ConfigError, LayoutError, nearest


@dataclass(frozen=True, kw_only=True)
class MatrixSpec:
    """How the logical matrices of one parameter are stored; the default is one plain matrix.

    Read from the top: the axes are put in the order (out, in), the rows are divided among the
    matrices stacked in them, and each of these is divided among its heads.

    Example:
        >>> # 8 heads of queries on 2 of keys and values, stacked; q, k and v are a matrix each
        >>> grouped_query = MatrixSpec(splits=(512, 128, 128))
        >>> matrix_shapes((768, 512), grouped_query)
        [(1, 512, 512), (1, 128, 512), (1, 128, 512)]
        >>> # ... and now every head is
        >>> matrix_shapes((768, 512), MatrixSpec(splits=(512, 128, 128), heads=(8, 2, 2)))
        [(8, 64, 512), (2, 64, 512), (2, 64, 512)]
    """

    flattened: bool = False
    """All axes but the first together are `in`, as in a convolution kernel."""
    transposed: bool = False
    """The last two axes are (in, out)."""
    splits: tuple[int, ...] = ()
    """Rows of each of the matrices stacked along `out`; empty for a single matrix."""
    groups: int = 1
    """The rows are so many equal groups, and each group holds its share of every split, in their
    order. As many groups as a split has rows is one row of each in turn."""
    heads: int | tuple[int, ...] = 1
    """Each matrix is so many equal blocks of rows which are matrices of their own, one for each
    attention head; one number for all splits, or one for each."""
    by_columns: bool = False
    """Heads are blocks of columns, as in the projection that follows attention."""


_TYPES = {
    "flattened": "true or false",
    "transposed": "true or false",
    "splits": "a list of whole numbers",
    "groups": "a whole number",
    "heads": "a whole number, or a list of them",
    "by_columns": "true or false",
}

PLAIN = MatrixSpec()
"""One matrix `[out, in]`, or a stack `[..., out, in]` of them."""


def amend(layout: MatrixSpec, changes: Mapping[str, object]) -> MatrixSpec:
    """Return `layout` with some fields changed, lists taken for tuples.

    Raises:
        ConfigError: for a field that there is not, or a value of the wrong type.

    Example:
        >>> amend(MatrixSpec(transposed=True), {"heads": 8}) == MatrixSpec(transposed=True, heads=8)
        True
    """
    accepted = {f.name for f in fields(MatrixSpec)}
    new: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in accepted:
            raise ConfigError(f"matrices has no field {name!r}: {nearest(name, accepted)}")
        new[name] = tuple(value) if isinstance(value, list) else value
        if not _fits(name, new[name]):
            raise ConfigError(
                f"matrices.{name} is {value!r}, of type {type(value).__name__}; accepted: {_TYPES[name]}"
            )
    return replace(layout, **new)


def _fits(name: str, value: object) -> bool:
    """Return whether `value` has the type of a field."""
    if isinstance(value, bool) or isinstance(getattr(PLAIN, name), bool):
        return isinstance(value, bool) and isinstance(getattr(PLAIN, name), bool)
    if isinstance(value, tuple):
        return name in ("splits", "heads") and all(type(number) is int for number in value)
    return name in ("groups", "heads") and isinstance(value, int)


def matrix_shapes(shape: Sequence[int], layout: MatrixSpec) -> list[tuple[int, int, int]]:
    """Return (number, out, in) of each batch that `view` gives for a tensor of `shape`.

    Raises:
        LayoutError: if a tensor of `shape` cannot be stored in this way.
    """
    leading, out, in_ = stack_shape(shape, layout)
    splits = layout.splits or (out,)
    if sum(splits) != out or min(splits) < 0:
        raise LayoutError(
            f"splits {splits} do not add up to the {out} rows of {_of(shape)}; they must"
        )
    if layout.groups < 1 or any(rows % layout.groups for rows in splits):
        raise LayoutError(
            f"groups={layout.groups} does not divide the rows {splits} of {_of(shape)}"
            "; give a divisor"
        )
    if layout.groups > 1 and not layout.splits:
        raise LayoutError(
            f"groups={layout.groups} says nothing without splits, at {_of(shape)}"
            "; give both, or leave groups out"
        )
    shapes = []
    for rows, heads in zip(splits, heads_of(layout, len(splits), shape), strict=True):
        length = in_ if layout.by_columns else rows
        if heads < 1 or length % heads:
            axis = "columns" if layout.by_columns else "rows"
            raise LayoutError(
                f"heads={heads} does not divide the {length} {axis} of {_of(shape)}; give a divisor"
            )
        each = (rows, in_ // heads) if layout.by_columns else (rows // heads, in_)
        shapes.append((leading * heads, *each))
    return shapes


def stack_shape(shape: Sequence[int], layout: MatrixSpec) -> tuple[int, int, int]:
    """Return (leading axes, out, in) before rows are divided."""
    if len(shape) < 2:
        raise LayoutError(f"{_of(shape)} holds no matrix: at least two axes are needed")
    if layout.flattened:
        leading, out, in_ = 1, shape[0], math.prod(shape[1:])
    else:
        leading, out, in_ = math.prod(shape[:-2]), shape[-2], shape[-1]
    return (leading, in_, out) if layout.transposed else (leading, out, in_)


def heads_of(layout: MatrixSpec, splits: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the number of heads of each of `splits` matrices stacked along `out`."""
    if isinstance(layout.heads, int):
        return (layout.heads,) * splits
    if len(layout.heads) != splits:
        raise LayoutError(
            f"heads={layout.heads}, but {_of(shape)} holds {splits} matrices"
            "; give heads to a parameter of one matrix, or leave them out"
        )
    return layout.heads


def _of(shape: Sequence[int]) -> str:
    return f"shape {tuple(shape)}"


# Axes below: N leading, M rows (out), K columns (in), G groups, H heads.


def view(X: Tensor, layout: MatrixSpec) -> list[Tensor]:
    """Return the logical matrices of `X` as batches `[n, out, in]`, views where strides allow.

    One batch per split, in their order; n counts the leading axes and, within them, the heads.

    Raises:
        LayoutError: if `X` cannot be stored in this way.
    """
    shapes = matrix_shapes(X.shape, layout)
    X_NMK = stacked(X, layout)
    heads = heads_of(layout, len(shapes), X.shape)
    return [
        _cutheads_of(part, number, layout)
        for part, number in zip(_split(X_NMK, layout), heads, strict=True)
    ]


def unview(batches: Sequence[Tensor], layout: MatrixSpec, shape: Sequence[int]) -> Tensor:
    """Return the tensor of `shape` whose matrices are `batches`: the inverse of `view`."""
    heads = heads_of(layout, len(batches), shape)
    parts = [_joinheads_of(b, number, layout) for b, number in zip(batches, heads, strict=True)]
    X_NMK = _join(parts, layout)
    if layout.transposed:
        X_NMK = X_NMK.mT
    return X_NMK.reshape(tuple(shape))


def stacked(X: Tensor, layout: MatrixSpec) -> Tensor:
    """Return `X` as `[leading, out, in]`, before rows are divided."""
    if layout.flattened:
        X_NMK = X.reshape(1, X.shape[0], -1)
    else:
        X_NMK = X.unsqueeze(0) if X.ndim == 2 else X.flatten(0, -3)
    return X_NMK.mT if layout.transposed else X_NMK


def _split(X_NMK: Tensor, layout: MatrixSpec) -> list[Tensor]:
    if not layout.splits:
        return [X_NMK]
    if layout.groups == 1:
        return list(X_NMK.split(list(layout.splits), dim=1))
    X_NGMK = X_NMK.unflatten(1, (layout.groups, -1))
    shares = [rows // layout.groups for rows in layout.splits]
    return [part.flatten(1, 2) for part in X_NGMK.split(shares, dim=2)]


def _join(parts: list[Tensor], layout: MatrixSpec) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if layout.groups == 1:
        return torch.cat(parts, dim=1)
    grouped = [part.unflatten(1, (layout.groups, -1)) for part in parts]
    return torch.cat(grouped, dim=2).flatten(1, 2)


def _cutheads_of(X_NMK: Tensor, heads: int, layout: MatrixSpec) -> Tensor:
    if heads == 1:
        return X_NMK
    if layout.by_columns:
        return X_NMK.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)
    return X_NMK.unflatten(1, (heads, -1)).flatten(0, 1)


def _joinheads_of(batch: Tensor, heads: int, layout: MatrixSpec) -> Tensor:
    if heads == 1:
        return batch
    X_NHMK = batch.unflatten(0, (-1, heads))
    return X_NHMK.transpose(1, 2).flatten(2, 3) if layout.by_columns else X_NHMK.flatten(1, 2)
