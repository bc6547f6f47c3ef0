"""Newton-Schulz on the Gram matrix, with restarts: one iteration, of which the direct form is a case.

With `R = X @ X.T` every step multiplies `X` from the left by a polynomial of `R`, so that a run of
steps is `X <- Q @ X` with `Q` made from S x S products alone. A *segment* is such a run: it forms `R`
anew from `X`, and ends with `Q @ X`. All steps in one segment are the Gram form; segments of one step
each are the direct form, `X <- (a*I + b*R + c*R@R) @ X`; what lies between is the Gram form with
restarts. In exact arithmetic they are the same polynomial.

The normalisation is read off the first Gram matrix, `R <- D R D` with a diagonal `D`, and enters the
first `Q`: no pass over `X` is spent on it.

Source: Dao-AILab, Gram Newton-Schulz (2026), the restart included; letters R, Q, Z as there.
Shapes: N matrices, M rows, K columns, S = min(M, K). S x S matrices are symmetric; those within a
segment commute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muonscale.optim.newton_schulz.coefficients import Coefficients, Triple
from muonscale.optim.newton_schulz.kernels.products import (
    empty_squares,
    product_,
    symmetric_product_,
)
from muonscale.optim.newton_schulz.subgroup import Subgroup

Segments = tuple[int, ...]
"""Number of steps between two restarts, in order."""


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """What one batch of matrices is worked on in, and the next after it."""

    X_NMK: Tensor
    """Overwritten from the second segment on; of no use to the caller."""
    R_NSS: Tensor
    Z_NSS: Tensor
    Q_NSS: Tensor
    T_NSS: Tensor
    """The second place of Q; `R @ Z` in between."""
    panel: int
    """See `muonscale.optim.newton_schulz.kernels.products`."""
    tall: bool
    """Whether the whole matrices have more rows than columns."""
    team: Subgroup | None = None
    """The ranks of whose matrices X is a part; None for whole matrices."""

    def first(self, count: int) -> Workspace:
        """Return the part for `count` matrices."""
        parts = {n: part[:count] for n, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **parts)

    def square_(
        self, C: Tensor, A: Tensor, B: Tensor, *, bias: Tensor, beta: float, alpha: float = 1.0
    ) -> None:
        """Write `beta * bias + alpha * A @ B` into `C`, all S x S and symmetric."""
        if self.team is None:
            symmetric_product_(C, A, B, self.panel, bias=bias, beta=beta, alpha=alpha)
        else:
            self.team.product_(C, A, B, bias=bias, beta=beta, alpha=alpha)


def make_workspace(
    like_NMK: Tensor,
    segments: Segments,
    panel: int,
    *,
    shape: tuple[int, int] | None = None,
    team: Subgroup | None = None,
) -> Workspace:
    """Return room for as many matrices as `like_NMK` has, in its shape, dtype and device.

    Args:
        like_NMK: the matrices, or this rank's parts of them.
        segments: as for `newton_schulz_`.
        panel: see `muonscale.optim.newton_schulz.kernels.products`.
        shape: (out, in) of the whole matrices, where these are parts.
        team: that shares them.
    """
    count, *part = like_NMK.shape
    rows, columns = shape or part
    side = min(rows, columns)
    R, Z, Q, T = (empty_squares(like_NMK, count, side, panel) for _ in range(4))
    # With one segment X is read from where it is.
    X_NMK = torch.empty_like(like_NMK if len(segments) > 1 else like_NMK[:, :0])
    return Workspace(
        X_NMK=X_NMK,
        R_NSS=R,
        Z_NSS=Z,
        Q_NSS=Q,
        T_NSS=T,
        panel=panel,
        tall=rows > columns,
        team=team,
    )


def newton_schulz_(
    O_NMK: Tensor,
    X_NMK: Tensor,
    coefficients: Coefficients,
    segments: Segments,
    workspace: Workspace,
    *,
    normalized: bool,
) -> None:
    """Write the Newton-Schulz polynomial of every matrix in `X` into `O`.

    Args:
        O_NMK: `[N, M, K]`, contiguous; overwritten.
        X_NMK: `[N, M, K]`, in the same dtype, not written to; of a size whose squares are in range.
        coefficients: triples and normalisation.
        segments: lengths that add up to the number of triples.
        workspace: room for N matrices of this shape or more.
        normalized: `X` has been divided by the norm that the coefficients are meant for.
    """
    room = workspace.first(X_NMK.shape[0])
    first = 0
    # The result of the last segment belongs in O, so those before it alternate backwards from there.
    targets = [O_NMK if (len(segments) - n) % 2 else room.X_NMK for n in range(len(segments))]
    for target, length in zip(targets, segments, strict=True):
        triples = coefficients.triples[first : first + length]
        _gram_matrix_(room, X_NMK)
        scale = None if normalized or first else _take_scale_(room.R_NSS, coefficients)
        if length == 1 and scale is None:
            _apply_one_(target, X_NMK, triples[0], room)
        else:
            Q_NSS = _accumulate(triples, room)
            if scale is not None:
                # O = Q (D X): the columns of Q take the scale.
                Q_NSS.mul_(scale.mT)
            _multiply_(target, Q_NSS, X_NMK, tall=room.tall)
        X_NMK = target
        first += length


def _gram_matrix_(room: Workspace, X_NMK: Tensor) -> None:
    left, right = (X_NMK.mT, X_NMK) if room.tall else (X_NMK, X_NMK.mT)
    symmetric_product_(room.R_NSS, left, right, room.panel)
    if room.team is not None:
        room.team.sum_(room.R_NSS)


def _take_scale_(R_NSS: Tensor, coefficients: Coefficients) -> Tensor:
    """Return `D` as a column `[N, S or 1, 1]`, and write `D R D` into `R`.

    A zero matrix, or a zero row under "aol", has the scale 0 and stays zero.
    """
    wide = R_NSS.to(torch.promote_types(R_NSS.dtype, torch.float32))
    if coefficients.normalization == "aol":
        squared = wide.abs().sum(-1, keepdim=True)
    else:
        squared = wide.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    if coefficients.normalization == "schatten4":
        # Relative to the trace, so that the squares of squares stay in range.
        unit = wide / squared.masked_fill(squared == 0, 1.0)
        squared = squared * torch.linalg.vector_norm(unit, dim=(-2, -1), keepdim=True)
    scale = squared.rsqrt().masked_fill_(squared == 0, 0.0).div_(coefficients.margin)
    scale = scale.to(R_NSS.dtype)
    R_NSS.mul_(scale).mul_(scale.mT)
    return scale


def _accumulate(triples: Sequence[Triple], room: Workspace) -> Tensor:
    """Return `Q` of the segment that starts from `R`, in the workspace; `R` is overwritten."""
    R, Q, T = room.R_NSS, room.Q_NSS, room.T_NSS
    for step, (a, b, c) in enumerate(triples):
        Z = _increment_(room, b, c)
        if step == 0:
            Q.copy_(Z).diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            room.square_(T, Q, Z, bias=Q, beta=a)
            Q, T = T, Q
        if step < len(triples) - 1:
            room.square_(T, R, Z, bias=R, beta=a)
            room.square_(R, T, Z, bias=T, beta=a)
    return Q


def _increment_(room: Workspace, b: float, c: float) -> Tensor:
    """Return `Z = b*R + c*R@R`, in the workspace: a step is `X <- (a*I + Z) @ X`."""
    if c == 0:
        return torch.mul(room.R_NSS, b, out=room.Z_NSS)
    R = room.R_NSS
    room.square_(room.Z_NSS, R, R, bias=R, beta=b, alpha=c)
    return room.Z_NSS


def _apply_one_(target: Tensor, X_NMK: Tensor, triple: Triple, room: Workspace) -> None:
    """Write `a*X + Z @ X`: one step, with the large part of X added last, in the wide accumulator."""
    a, b, c = triple
    Z_NSS = _increment_(room, b, c)
    left, right = (X_NMK, Z_NSS) if room.tall else (Z_NSS, X_NMK)
    product_(target, left, right, bias=X_NMK, beta=a)


def _multiply_(target: Tensor, Q_NSS: Tensor, X_NMK: Tensor, *, tall: bool) -> None:
    left, right = (X_NMK, Q_NSS.mT) if tall else (Q_NSS, X_NMK)
    product_(target, left, right)
