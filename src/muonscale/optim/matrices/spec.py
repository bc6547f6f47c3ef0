"""Which logical matrices a parameter holds, and how they are stored in it.

A logical matrix is `(out, in)`, as in `y = W @ x`. A parameter may hold its transpose, several
matrices stacked or interleaved along `out`, one matrix for each attention head, or a batch
`[E, out, in]` of matrices. `view` returns the matrices of a tensor that is stored like the
parameter. `unview` is its inverse.
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
    """How the logical matrices of one parameter are stored; by default, one plain matrix.

    The fields apply in order: the axes are brought to the order (out, in), the rows are divided
    into the stacked matrices, and each of these is divided into its heads.

    Examples:
        >>> # 8 query heads and 2 heads of keys and values; q, k and v are one matrix each
        >>> grouped_query = MatrixSpec(splits=(512, 128, 128))
        >>> matrix_shapes((768, 512), grouped_query)
        [(1, 512, 512), (1, 128, 512), (1, 128, 512)]
        >>> # the same, with one matrix for each head
        >>> matrix_shapes((768, 512), MatrixSpec(splits=(512, 128, 128), heads=(8, 2, 2)))
        [(8, 64, 512), (2, 64, 512), (2, 64, 512)]
    """

    flattened: bool = False
    """All axes after the first are flattened to `in`, as in a convolution kernel."""
    transposed: bool = False
    """The stored axes are (in, out)."""
    splits: tuple[int, ...] = ()
    """Number of rows of each matrix stacked along `out`; empty for a single matrix."""
    groups: int = 1
    """Number of interleaved blocks. Each block holds rows / groups of every split, in order. If it
    equals the rows of a split, the splits are interleaved row by row."""
    heads: int | tuple[int, ...] = 1
    """Number of attention heads of each matrix: equal blocks of rows, each a matrix of its own. One
    number for all splits, or one for each."""
    by_columns: bool = False
    """Heads are blocks of columns instead, as in the output projection of attention."""
    interleaved: bool = False
    """Heads by columns are interleaved: column c belongs to head c modulo `heads`, as in LoRA's B
    on a stack of experts.
    """


_TYPES = {
    "flattened": "true or false",
    "transposed": "true or false",
    "splits": "a list of whole numbers",
    "groups": "a whole number",
    "heads": "a whole number, or a list of them",
    "by_columns": "true or false",
    "interleaved": "true or false",
}

PLAIN = MatrixSpec()
"""One matrix `[out, in]`, or a batch `[..., out, in]` of them."""


def amend(spec: MatrixSpec, changes: Mapping[str, object]) -> MatrixSpec:
    """Return `spec` with some fields changed. Lists become tuples.

    Raises:
        ConfigError: if a field does not exist, or a value has the wrong type.

    Examples:
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
    return replace(spec, **new)


def _fits(name: str, value: object) -> bool:
    """Return whether `value` has the type of a field."""
    if isinstance(value, bool) or isinstance(getattr(PLAIN, name), bool):
        return isinstance(value, bool) and isinstance(getattr(PLAIN, name), bool)
    if isinstance(value, tuple):
        return name in ("splits", "heads") and all(type(number) is int for number in value)
    return name in ("groups", "heads") and isinstance(value, int)


def matrix_shapes(shape: Sequence[int], spec: MatrixSpec) -> list[tuple[int, int, int]]:
    """Return (number, out, in) of each batch that `view` returns for a tensor of `shape`.

    Raises:
        LayoutError: if a tensor of `shape` cannot be stored in this way.
    """
    leading, out, in_ = batch_shape(shape, spec)
    splits = spec.splits or (out,)
    if sum(splits) != out or min(splits) < 0:
        raise LayoutError(f"splits {splits} must add up to the {out} rows of shape {tuple(shape)}")
    if spec.groups < 1 or any(rows % spec.groups for rows in splits):
        raise LayoutError(
            f"groups={spec.groups} does not divide each of the splits {splits} of shape {tuple(shape)}"
        )
    if spec.groups > 1 and not spec.splits:
        raise LayoutError(
            f"groups={spec.groups} has no effect on shape {tuple(shape)} without splits. Set splits or "
            "leave groups out"
        )
    if spec.interleaved and (not spec.by_columns or spec.flattened):
        raise LayoutError(
            f"interleaved heads of shape {tuple(shape)} must be by columns of a matrix, but "
            f"by_columns={spec.by_columns} and flattened={spec.flattened}"
        )
    shapes = []
    for rows, heads in zip(splits, heads_of(spec, len(splits), shape), strict=True):
        length = in_ if spec.by_columns else rows
        if heads < 1 or length % heads:
            axis = "columns" if spec.by_columns else "rows"
            raise LayoutError(
                f"heads={heads} does not divide the {length} {axis} of shape {tuple(shape)}"
            )
        each = (rows, in_ // heads) if spec.by_columns else (rows // heads, in_)
        shapes.append((leading * heads, *each))
    return shapes


def batch_shape(shape: Sequence[int], spec: MatrixSpec) -> tuple[int, int, int]:
    """Return the shape of `to_batch` for a tensor of `shape`."""
    if len(shape) < 2:
        raise LayoutError(f"shape {tuple(shape)} holds no matrix: at least two axes are needed")
    if spec.flattened:
        leading, out, in_ = 1, shape[0], math.prod(shape[1:])
    else:
        leading, out, in_ = math.prod(shape[:-2]), shape[-2], shape[-1]
    return (leading, in_, out) if spec.transposed else (leading, out, in_)


def heads_of(spec: MatrixSpec, splits: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the number of heads of each of `splits` matrices stacked along `out`."""
    if isinstance(spec.heads, int):
        return (spec.heads,) * splits
    if len(spec.heads) != splits:
        raise LayoutError(
            f"heads={spec.heads} has {len(spec.heads)} numbers, but shape {tuple(shape)} is divided "
            f"into {splits}. Give one number for each split, or a single one for all"
        )
    return spec.heads


# Axes below: N leading, M rows (out), K columns (in), G groups, H heads.


def view(X: Tensor, spec: MatrixSpec) -> list[Tensor]:
    """Return the logical matrices of `X` as batches `[n, out, in]`, as views if strides allow.

    There is one batch per split, in order. n counts the leading axes and, within them, the heads.

    Raises:
        LayoutError: if a tensor of this shape cannot be stored in this way.
    """
    shapes = matrix_shapes(X.shape, spec)
    X_NMK = to_batch(X, spec)
    heads = heads_of(spec, len(shapes), X.shape)
    return [
        _split_heads(part, number, spec)
        for part, number in zip(_split(X_NMK, spec), heads, strict=True)
    ]


def unview(batches: Sequence[Tensor], spec: MatrixSpec, shape: Sequence[int]) -> Tensor:
    """Return the tensor of `shape` whose matrices are `batches`. The inverse of `view`."""
    heads = heads_of(spec, len(batches), shape)
    parts = [_merge_heads(b, number, spec) for b, number in zip(batches, heads, strict=True)]
    X_NMK = _join(parts, spec)
    if spec.transposed:
        X_NMK = X_NMK.mT
    return X_NMK.reshape(tuple(shape))


def to_batch(X: Tensor, spec: MatrixSpec) -> Tensor:
    """Return `X` as `[leading, out, in]`, before rows are divided into splits."""
    if spec.flattened:
        X_NMK = X.reshape(1, X.shape[0], -1)
    else:
        X_NMK = X.unsqueeze(0) if X.ndim == 2 else X.flatten(0, -3)
    return X_NMK.mT if spec.transposed else X_NMK


def _split(X_NMK: Tensor, spec: MatrixSpec) -> list[Tensor]:
    if not spec.splits:
        return [X_NMK]
    if spec.groups == 1:
        return list(X_NMK.split(list(spec.splits), dim=1))
    X_NGMK = X_NMK.unflatten(1, (spec.groups, -1))
    shares = [rows // spec.groups for rows in spec.splits]
    return [part.flatten(1, 2) for part in X_NGMK.split(shares, dim=2)]


def _join(parts: list[Tensor], spec: MatrixSpec) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if spec.groups == 1:
        return torch.cat(parts, dim=1)
    grouped = [part.unflatten(1, (spec.groups, -1)) for part in parts]
    return torch.cat(grouped, dim=2).flatten(1, 2)


def _split_heads(X_NMK: Tensor, heads: int, spec: MatrixSpec) -> Tensor:
    if heads == 1:
        return X_NMK
    if spec.interleaved:
        return X_NMK.unflatten(2, (-1, heads)).movedim(3, 1).flatten(0, 1)
    if spec.by_columns:
        return X_NMK.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)
    return X_NMK.unflatten(1, (heads, -1)).flatten(0, 1)


def _merge_heads(batch: Tensor, heads: int, spec: MatrixSpec) -> Tensor:
    if heads == 1:
        return batch
    X_NHMK = batch.unflatten(0, (-1, heads))
    if spec.interleaved:
        return X_NHMK.movedim(1, 3).flatten(2, 3)
    return X_NHMK.transpose(1, 2).flatten(2, 3) if spec.by_columns else X_NHMK.flatten(1, 2)
