"""Which logical matrices a parameter holds, and how they are stored in it.

A logical matrix is `(out, in)`, as in `y = W @ x`. A parameter may hold its transpose, several
matrices stacked along `out`, or a whole stack `[E, out, in]` of them. `view` gives the matrices of
a tensor with the parameter's shape, `unview` puts such matrices back into the stored form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muonscale.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """How the logical matrices of one parameter are stored; the default is one plain matrix."""

    transposed: bool = False
    """The last two axes are (in, out)."""
    splits: tuple[int, ...] = ()
    """Rows of each of the matrices stacked along `out`; empty for a single matrix."""
    interleaved: bool = False
    """Row r belongs to matrix `r % len(splits)`, not to a block of rows; needs equal splits."""
    flattened: bool = False
    """All axes but the first together are `in`, as in a convolution kernel."""


PLAIN = Matrices()
"""One matrix `[out, in]`, or a stack `[..., out, in]` of them."""


def matrix_shapes(shape: Sequence[int], layout: Matrices) -> list[tuple[int, int, int]]:
    """Return (number, out, in) of each batch that `view` gives for a tensor of `shape`.

    Raises:
        LayoutError: if a tensor of `shape` cannot be stored in this way.
    """
    if len(shape) < 2:
        raise LayoutError(f"shape {tuple(shape)} holds no matrix: at least two axes are needed")
    if layout.flattened:
        leading, out, in_ = 1, shape[0], math.prod(shape[1:])
    else:
        leading, out, in_ = math.prod(shape[:-2]), shape[-2], shape[-1]
    if layout.transposed:
        out, in_ = in_, out
    splits = layout.splits or (out,)
    if sum(splits) != out:
        raise LayoutError(f"rows {splits} do not add up to the {out} rows of shape {tuple(shape)}")
    if layout.interleaved and len(set(splits)) != 1:
        raise LayoutError(f"rows {splits} are not equal: interleaved matrices must be")
    return [(leading, rows, in_) for rows in splits]


def view(X: Tensor, layout: Matrices) -> list[Tensor]:
    """Return the logical matrices of `X` as batches `[n, out, in]`, views where strides allow.

    One batch per split, in their order; n counts the leading axes.

    Raises:
        LayoutError: if `X` cannot be stored in this way.
    """
    matrix_shapes(X.shape, layout)
    X_NMK = X.reshape(X.shape[0], -1).unsqueeze(0) if layout.flattened else _stack(X)
    if layout.transposed:
        X_NMK = X_NMK.mT
    if not layout.splits:
        return [X_NMK]
    if layout.interleaved:
        count = len(layout.splits)
        return [X_NMK[:, first::count] for first in range(count)]
    return list(X_NMK.split(list(layout.splits), dim=1))


def unview(batches: Sequence[Tensor], layout: Matrices, shape: Sequence[int]) -> Tensor:
    """Return the tensor of `shape` whose matrices are `batches`: the inverse of `view`."""
    if len(batches) == 1:
        X_NMK = batches[0]
    elif layout.interleaved:
        X_NMK = torch.stack(list(batches), dim=2).flatten(1, 2)
    else:
        X_NMK = torch.cat(list(batches), dim=1)
    if layout.transposed:
        X_NMK = X_NMK.mT
    return X_NMK.reshape(tuple(shape))


def _stack(X: Tensor) -> Tensor:
    return X.unsqueeze(0) if X.ndim == 2 else X.flatten(0, -3)
