"""Normalizations before the polar step: MuonEq rows and columns.

A *pre-normalization* works on a batch of logical matrices, and sums over whole matrices only
through a `Reducer`. It has no epsilon: the update does not depend on the length of the gradient,
and a row or column of zeros stays zero. Squares are summed in float64, where they are in range.

Shapes: N matrices, M rows (out), K columns (in).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from muonscale.optim.options import check_word
from muonscale.optim.rules.post_norm import Reducer


@dataclass(frozen=True, kw_only=True)
class PreNorm:
    """One row of `PRE_NORMS`."""

    apply: Callable[[Tensor, Reducer], Tensor]
    """From directions `[N, M, K]` to new tensors, which are then orthogonalized."""
    source: str


def _row_lengths(N_NMK: Tensor, reducer: Reducer) -> Tensor:
    """Return `[N, M, 1]`, float64."""
    lengths = torch.linalg.vector_norm(N_NMK, dim=-1, keepdim=True, dtype=torch.float64)
    return reducer.sum_cols(lengths.square_()).sqrt_()


def _column_lengths(N_NMK: Tensor, reducer: Reducer) -> Tensor:
    """Return `[N, 1, K]`, float64."""
    lengths = torch.linalg.vector_norm(N_NMK, dim=-2, keepdim=True, dtype=torch.float64)
    return reducer.sum_rows(lengths.square_()).sqrt_()


def _divided(N_NMK: Tensor, lengths: Tensor) -> Tensor:
    """Return `N / lengths`, and 0 where a length is 0."""
    return N_NMK / lengths.masked_fill(lengths == 0, 1.0).to(N_NMK.dtype)


def _rows(N_NMK: Tensor, reducer: Reducer) -> Tensor:
    return _divided(N_NMK, _row_lengths(N_NMK, reducer))


def _columns(N_NMK: Tensor, reducer: Reducer) -> Tensor:
    return _divided(N_NMK, _column_lengths(N_NMK, reducer))


def _both(N_NMK: Tensor, reducer: Reducer) -> Tensor:
    """`||N||_F * N_ij / (||row i|| * ||column j||)`; the polar factor does not see the norm."""
    rows_NM1 = _row_lengths(N_NMK, reducer)
    norm_N11 = reducer.sum_rows(rows_NM1.square()).sqrt_()
    columns_N1K = _column_lengths(N_NMK, reducer)
    relative_N1K = columns_N1K / norm_N11.masked_fill(norm_N11 == 0, 1.0)
    return _divided(_divided(N_NMK, rows_NM1), relative_N1K)


_MUON_EQ = "Chang et al., MuonEq, arXiv 2603.28254"

PRE_NORMS: dict[str, PreNorm] = {
    "row": PreNorm(apply=_rows, source=f"{_MUON_EQ}, variant R"),
    "col": PreNorm(apply=_columns, source=f"{_MUON_EQ}, variant C"),
    "row_col": PreNorm(apply=_both, source=f"{_MUON_EQ}, variant RC"),
}
"""Every pre-normalization.

A new one is a row here, its name in `muonscale.optim.options.PreNormT`, and a branch in
`muonscale.optim.rules.reference`.

`row` makes every row of unit length, and `col` every column. `row_col` divides by the lengths of
both, as they are before either division.
"""


def resolve_pre_norm(name: str | None) -> PreNorm | None:
    """Return the row of `PRE_NORMS` called `name`, or None for None.

    Raises:
        ConfigError: for an unknown name.
    """
    if name is None:
        return None
    check_word("pre_norm", name, tuple(PRE_NORMS))
    return PRE_NORMS[name]
