"""Normalizations after the polar step: Muon+ rows and columns, NorMuon, the Frobenius snap.

A *post-normalization* works on a batch of logical matrices. It sums over whole matrices only
through a `Reducer`, so its code is the same whether the matrices are whole on this process or not.
Other projects call two different things Muon+: rows or columns of unit length ("row" to "col_row"
here), and rescaling the whole update to one length ("frobenius" here).

Shapes: N matrices, M rows (out), K columns (in).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from muonscale.errors import ConfigError, nearest

LastT = Literal["row", "col"]
"""What has unit length after the last normalization: all rows, or all columns."""


class Reducer(Protocol):
    """Sums over whole logical matrices, of which `X_NMK` may be a part."""

    def sum_rows(self, X_NMK: Tensor) -> Tensor:
        """Return `[N, 1, K]`: the sum of every column, over all rows."""
        ...

    def sum_cols(self, X_NMK: Tensor) -> Tensor:
        """Return `[N, M, 1]`: the sum of every row, over all columns."""
        ...

    def sum_all(self, X_NMK: Tensor) -> Tensor:
        """Return `[N, 1, 1]`: the sum of every matrix."""
        ...


class LocalReducer:
    """Sums over matrices that are whole on this process."""

    def sum_rows(self, X_NMK: Tensor) -> Tensor:
        """Return `[N, 1, K]`."""
        return X_NMK.sum(-2, keepdim=True)

    def sum_cols(self, X_NMK: Tensor) -> Tensor:
        """Return `[N, M, 1]`."""
        return X_NMK.sum(-1, keepdim=True)

    def sum_all(self, X_NMK: Tensor) -> Tensor:
        """Return `[N, 1, 1]`."""
        return X_NMK.sum((-2, -1), keepdim=True)


LOCAL = LocalReducer()


@dataclass(frozen=True, kw_only=True)
class PostNormContext:
    """The inputs of a post-normalization besides the update."""

    shape: tuple[int, int]
    """(out, in) of the logical matrices."""
    eps: float
    beta2: float
    """Decay rate of NorMuon's row state."""
    reducer: Reducer = LOCAL


@dataclass(frozen=True, kw_only=True)
class PostNorm:
    """One row of `POST_NORMS`."""

    apply: Callable[[Tensor, Tensor | None, PostNormContext], tuple[Tensor, Tensor | None]]
    """From O `[N, M, K]` and the row state `[N, M, 1]` (or None) to the new O and row state."""
    last: LastT | None
    """"row" or "col" if rows or columns have unit length afterwards; None if the update keeps the
    length of the polar factor."""
    row_state: bool = False
    """Whether one value per row is kept from step to step."""
    source: str


def _rows(O_NMK: Tensor, context: PostNormContext) -> Tensor:
    return O_NMK / (context.reducer.sum_cols(O_NMK.square()) + context.eps).sqrt_()


def _cols(O_NMK: Tensor, context: PostNormContext) -> Tensor:
    return O_NMK / (context.reducer.sum_rows(O_NMK.square()) + context.eps).sqrt_()


def _stateless(
    *parts: Callable[[Tensor, PostNormContext], Tensor],
) -> Callable[[Tensor, Tensor | None, PostNormContext], tuple[Tensor, Tensor | None]]:
    """Return the `apply` of normalizations that run in this order."""

    def apply(
        O_NMK: Tensor, V_NM1: Tensor | None, context: PostNormContext
    ) -> tuple[Tensor, Tensor | None]:
        for part in parts:
            O_NMK = part(O_NMK, context)
        return O_NMK, V_NM1

    return apply


def _frobenius(O_NMK: Tensor, context: PostNormContext) -> Tensor:
    """`sqrt(min(out, in)) * O / sqrt(||O||_F^2 + eps)`: the length of an exact polar factor."""
    length = (context.reducer.sum_all(O_NMK.square()) + context.eps).sqrt_()
    return O_NMK * (math.sqrt(min(context.shape)) / length)


def _normuon(
    O_NMK: Tensor, V_NM1: Tensor | None, context: PostNormContext
) -> tuple[Tensor, Tensor | None]:
    """`V <- b2*V + (1-b2)*mean_j O_ij^2`, then `O / (sqrt(V) + eps)` at the length of O.

    The rescaling to that length takes away what a bias correction of V would do.
    """
    assert V_NM1 is not None
    reducer = context.reducer
    sums_NM1 = reducer.sum_cols(O_NMK.square())
    V_NM1 = V_NM1.lerp(sums_NM1 / max(1, context.shape[1]), 1 - context.beta2)
    divisor_NM1 = V_NM1.sqrt() + context.eps
    # The squared length afterwards follows from that of each row: no second look at the matrix.
    after = reducer.sum_rows((sums_NM1.sqrt() / divisor_NM1).square())
    ratio = reducer.sum_rows(sums_NM1) / after.masked_fill(after == 0, 1.0)
    return O_NMK * (ratio.sqrt() / divisor_NM1), V_NM1


_MUON_PLUS = "Zhang et al., Muon+, arXiv 2602.21545, equation 4"

POST_NORMS: dict[str, PostNorm] = {
    "row": PostNorm(apply=_stateless(_rows), last="row", source=_MUON_PLUS),
    "col": PostNorm(apply=_stateless(_cols), last="col", source=_MUON_PLUS),
    "row_col": PostNorm(apply=_stateless(_rows, _cols), last="col", source=_MUON_PLUS),
    "col_row": PostNorm(apply=_stateless(_cols, _rows), last="row", source=_MUON_PLUS),
    "normuon": PostNorm(
        apply=_normuon,
        last=None,
        row_state=True,
        source="Li et al., NorMuon, arXiv 2510.05491, algorithm 1; length kept as in its code",
    ),
    "frobenius": PostNorm(
        apply=_stateless(_frobenius), last=None, source="karpathy/nanochat, there called Muon+"
    ),
}
"""Every post-normalization.

A new one is a row here, its name in `muonscale.optim.options.PostNormT`, and a branch in
`muonscale.optim.rules.reference`. A reduction other than a sum is a method of `Reducer` and of
`newton_schulz.subgroup.SubgroupReducer`.

`row` makes every row of unit length, `X / sqrt(sum_j X_ij^2 + eps)`, and `col` every column.
`row_col` does rows, then columns; `col_row` columns, then rows.
"""


def resolve_post_norm(name: str | None) -> PostNorm | None:
    """Return the row of `POST_NORMS` called `name`, or None for None.

    Raises:
        ConfigError: for an unknown name.
    """
    if name is None:
        return None
    if name not in tuple(POST_NORMS):  # of any type, from a saved state
        hint = nearest(name, POST_NORMS)
        raise ConfigError(f"no post_norm is called {name!r}: {hint} (None for none)")
    return POST_NORMS[name]
