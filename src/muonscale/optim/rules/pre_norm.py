"""Normalizations before the polar step: MuonEq rows and columns, Aurora, signs.

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

from muonscale.optim.options import row_of
from muonscale.optim.rules.post_norm import LOCAL, Reducer


@dataclass(frozen=True, kw_only=True)
class PreNormContext:
    """The inputs of a pre-normalization besides the direction."""

    shape: tuple[int, int]
    """(out, in) of the logical matrices."""
    polar: Callable[[Tensor], Tensor]
    """The polar step, from a tensor like the direction to its polar factor."""
    reducer: Reducer = LOCAL


@dataclass(frozen=True, kw_only=True)
class PreNorm:
    """One row of `PRE_NORMS`."""

    apply: Callable[[Tensor, PreNormContext], Tensor]
    """From directions `[N, M, K]`, which it does not write to, to what is orthogonalized."""
    polar_runs: Callable[[tuple[int, int]], int] = lambda shape: 0
    """How often it runs the polar step itself, by (out, in)."""
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


def _rows(N_NMK: Tensor, context: PreNormContext) -> Tensor:
    return _divided(N_NMK, _row_lengths(N_NMK, context.reducer))


def _columns(N_NMK: Tensor, context: PreNormContext) -> Tensor:
    return _divided(N_NMK, _column_lengths(N_NMK, context.reducer))


def _both(N_NMK: Tensor, context: PreNormContext) -> Tensor:
    """`||N||_F * N_ij / (||row i|| * ||column j||)`; the polar factor does not see the norm."""
    rows_NM1 = _row_lengths(N_NMK, context.reducer)
    norm_N11 = context.reducer.sum_rows(rows_NM1.square()).sqrt_()
    columns_N1K = _column_lengths(N_NMK, context.reducer)
    relative_N1K = columns_N1K / norm_N11.masked_fill(norm_N11 == 0, 1.0)
    return _divided(_divided(N_NMK, rows_NM1), relative_N1K)


def _aurora(N_NMK: Tensor, context: PreNormContext) -> Tensor:
    """`X = D*N` with `D <- D / ||row i of polar(D*N)||`, by the long side, from unit rows.

    The rows of `polar(X)` are then nearly equal in length. Those of a square polar factor always
    are, so a square matrix stays as it is. (The target length of the paper cancels in the polar
    step, because it is the same for all rows.)
    """
    out, in_ = context.shape
    if out == in_:
        return N_NMK
    lengths = _row_lengths if out > in_ else _column_lengths
    X_NMK = _divided(N_NMK, lengths(N_NMK, context.reducer))
    return _divided(X_NMK, lengths(context.polar(X_NMK), context.reducer))


_MUON_EQ = "Chang et al., MuonEq, arXiv 2603.28254"

PRE_NORMS: dict[str, PreNorm] = {
    "row": PreNorm(apply=_rows, source=f"{_MUON_EQ}, variant R"),
    "col": PreNorm(apply=_columns, source=f"{_MUON_EQ}, variant C"),
    "row_col": PreNorm(apply=_both, source=f"{_MUON_EQ}, variant RC"),
    "sign": PreNorm(
        apply=lambda N_NMK, context: N_NMK.sign(), source="Si et al., AdaMuon, arXiv 2507.11005"
    ),
    "aurora": PreNorm(
        apply=_aurora,
        polar_runs=lambda shape: int(shape[0] != shape[1]),
        source="Aurora, arXiv 2606.27715; tilde-research/aurora-release, with its two polar steps and "
        "its exponent of 1/2",
    ),
}
"""Every pre-normalization.

A new one is a row here, its name in `muonscale.optim.options.PreNormT`, and a branch in
`muonscale.optim.rules.reference`.

`row` makes every row of unit length, and `col` every column. `row_col` divides by the lengths of
both, as they are before either division. `aurora` makes the rows of a tall matrix, or the columns
of a wide one, equal in length after the polar step. `sign` is the sign of every element.
"""


def resolve_pre_norm(name: str | None) -> PreNorm | None:
    """Return the row of `PRE_NORMS` called `name`, or None for None.

    Raises:
        ConfigError: for an unknown name.
    """
    return row_of("pre_norm", name, PRE_NORMS)
