"""The Muon rule as functions of tensors: momentum, polar factor, shape factor, decay.

Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, equations 1, 2 and 4, with an
average in place of the sum: `M <- mu*M + (1-mu)*G` is (1-mu) times the paper's momentum, so that the
polar factor is the same and the buffer keeps the length of a gradient.

Letters: G gradient, M momentum, N what is orthogonalised, U scaled update, W weight.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from muonscale.optim.coefficients import Triple
from muonscale.optim.finite import commit_, scratch
from muonscale.optim.matrices import Matrices, unview, view
from muonscale.optim.orthogonalize import DTypeLike, orthogonalize
from muonscale.optim.scale import ScaleLike, shape_factor

MOMENTUM_CONVENTION = "ema"
"""How `M` adds up: "ema" as here and in torch.optim.Muon; "sum" is the paper's `M <- mu*M + G`."""


@dataclass(frozen=True, kw_only=True)
class Polar:
    """From the momentum to the update, for matrices of every shape."""

    triples: tuple[Triple, ...]
    scale: ScaleLike
    rms: float
    dtype: DTypeLike


def momentum_step_(
    M: list[Tensor],
    G: list[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Write one momentum step into `M` and return what is to be orthogonalised.

        M <- mu*M + (1-mu)*G        N = mu*M + (1-mu)*G with Nesterov, else M

    Args:
        M: momentum buffers, float32 or float64.
        G: gradients, same shapes, any floating dtype; not written to.
        momentum: mu, in [0, 1).
        nesterov: look one step ahead.
        mask: see `commit_`.

    Returns:
        New tensors with Nesterov; without it the very buffers, which the caller only reads.
    """
    wide_G = [g.to(m.dtype) for g, m in zip(G, M, strict=True)]
    new_M = scratch(M, M, mask)
    torch._foreach_lerp_(new_M, wide_G, 1 - momentum)
    commit_(M, new_M, mask)
    if not nesterov:
        return list(M)
    return list(torch._foreach_lerp(wide_G, M, momentum))


def polar_updates(
    N: list[Tensor], layouts: list[Matrices], polar: Polar
) -> tuple[list[Tensor], int, list[Tensor]]:
    """Return the scaled update of every parameter, `U = factor(out, in) * NS(N)` per matrix.

    Matrices of the same shape are orthogonalised in one batch, whichever parameter they are from.

    Args:
        N: directions with the parameters' stored shapes; not written to.
        layouts: where the matrices lie in each of them.
        polar: coefficients and shape factor.

    Returns:
        Updates with the parameters' stored shapes; the number of matrices; 0-D tensors that add up
        to the sum of squares of all updates.
    """
    viewed = [view(direction, layout) for direction, layout in zip(N, layouts, strict=True)]
    pieces: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for piece in chain.from_iterable(viewed):
        pieces[_shape(piece)].append(piece)
    scaled = {shape: _scaled(shape, alike, polar) for shape, alike in pieces.items()}
    squares = [torch.linalg.vector_norm(U_NMK).square() for U_NMK in scaled.values()]
    left = {
        shape: iter(scaled[shape].split([piece.shape[0] for piece in alike]))
        for shape, alike in pieces.items()
    }
    updates = [
        unview([next(left[_shape(piece)]) for piece in own], layout, direction.shape)
        for own, layout, direction in zip(viewed, layouts, N, strict=True)
    ]
    return updates, sum(U_NMK.shape[0] for U_NMK in scaled.values()), squares


def _shape(piece: Tensor) -> tuple[int, int]:
    return piece.shape[1], piece.shape[2]


def _scaled(shape: tuple[int, int], alike: list[Tensor], polar: Polar) -> Tensor:
    """Return U of the batches `[n, out, in]` put together, in the dtype that came in."""
    N_NMK = alike[0] if len(alike) == 1 else torch.cat(alike)
    O_NMK = orthogonalize(N_NMK, polar.triples, len(polar.triples), polar.dtype)
    return O_NMK.to(N_NMK.dtype).mul_(shape_factor(polar.scale, shape, polar.rms))


def apply_updates_(
    W: list[Tensor],
    U: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    mask: Tensor | None = None,
) -> None:
    """Write `W <- (1 - lr*wd)*W - lr*U`, rounded once where `W` is narrower than `U`.

    The decay takes the scheduled learning rate alone, not the shape factor within `U`.
    """
    new_W = scratch(W, U, mask)
    torch._foreach_mul_(new_W, 1 - lr * weight_decay)
    torch._foreach_add_(new_W, U, alpha=-lr)
    commit_(W, new_W, mask)
