"""The Muon rule as functions of tensors: momentum, polar factor, post-normalisation, shape factor.

Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, equations 1, 2 and 4, with an
average in place of the sum: `M <- mu*M + (1-mu)*G` is (1-mu) times the paper's momentum, so that the
polar factor is the same and the buffer keeps the length of a gradient.

Letters: G gradient, M momentum, N what is orthogonalised, O its polar factor, U scaled update, V row
state, W weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from muonscale.optim.matrices.batches import MatrixBatches, MatrixShape
from muonscale.optim.newton_schulz.coefficients import Coefficients
from muonscale.optim.newton_schulz.gram import Segments
from muonscale.optim.newton_schulz.orthogonalize import (
    DTypeLike,
    orthogonalize,
    orthogonalize_part,
    products_dtype,
)
from muonscale.optim.newton_schulz.subgroup import Subgroup, SubgroupReducer, divided_axis
from muonscale.optim.rules.decay import decay_
from muonscale.optim.rules.master_weights import Weights
from muonscale.optim.rules.nonfinite import commit_, scratch
from muonscale.optim.rules.post_norm import LOCAL, NormContext, Reducer, resolve_post_norm
from muonscale.optim.rules.scale import ScaleLike, exact_factor, shape_factor

MOMENTUM_CONVENTION = "ema"
"""How `M` adds up: "ema" as here and in torch.optim.Muon; "sum" is the paper's `M <- mu*M + G`."""


CommDTypeT = Literal["float32", "bfloat16"]
COMM_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What directions and updates can travel in. Not float16: raw momentum is below its range."""


@dataclass(frozen=True, kw_only=True)
class Polar:
    """From the momentum to the update, for matrices of every shape."""

    coefficients: Coefficients
    form: str = "auto"
    dtype: DTypeLike = "auto"
    post_norm: str | None = None
    post_norm_eps: float = 1e-8
    normuon_beta2: float = 0.95
    scale: ScaleLike = "rms"
    rms: float = 0.2
    wire: torch.dtype = torch.float32
    """What directions and updates are rounded to, whether or not they travel."""


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
    if not M:  # this rank owns none
        return []
    wide_G = [g.to(m.dtype) for g, m in zip(G, M, strict=True)]
    new_M = scratch(M, M, mask)
    torch._foreach_lerp_(new_M, wide_G, 1 - momentum)
    commit_(M, new_M, mask)
    if not nesterov:
        return list(M)
    return list(torch._foreach_lerp(wide_G, M, momentum))


@dataclass(frozen=True)
class Updates:
    """What `polar_updates` returns."""

    tensors: list[Tensor]
    """Scaled updates with the parameters' stored shapes."""
    matrices: int
    squares: list[Tensor]
    """0-D tensors that add up to the sum of squares of all updates."""


def polar_updates(
    N: list[Tensor],
    stacks: MatrixBatches,
    polar: Polar,
    *,
    V: list[Tensor] | None = None,
    reducer: Reducer = LOCAL,
    mask: Tensor | None = None,
    compile: bool | str = False,
) -> Updates:
    """Return the scaled update of every parameter, per matrix `U = factor * post_norm(NS(N))`.

    Matrices of the same shape are worked on in one batch, whichever parameter they are from.

    Args:
        N: directions with the parameters' stored shapes; not written to, but taken out of the list,
            so that they are gone when the updates are made.
        stacks: where the matrices lie in each of them.
        polar: coefficients, post-normalisation and shape factor.
        V: row states of the parameters, written to, if the post-normalisation has one.
        reducer: how to sum over whole matrices.
        mask: see `commit_`; for `V`.
        compile: see `Muon`.
    """
    if compile:  # what "auto" asks the machine cannot be traced
        polar = replace(polar, dtype=products_dtype(N[0], polar.dtype))
    rows = None if V is None else stacks.gather_rows(V)
    scaled: dict[MatrixShape, Tensor] = {}
    gathered = stacks.gather(N)
    N.clear()
    for shape in list(gathered):
        update = stack_update(shape, polar, reducer, compile)
        V_NM1 = None if rows is None else rows[shape]
        scaled[shape], V_NM1 = update(gathered.pop(shape), V_NM1)
        if rows is not None and V_NM1 is not None:
            rows[shape] = V_NM1
    if V is not None and rows is not None:
        commit_(V, stacks.scatter_rows(rows), mask)
    return Updates(
        stacks.scatter(scaled),
        sum(U_NMK.shape[0] for U_NMK in scaled.values()),
        [torch.linalg.vector_norm(U_NMK).square() for U_NMK in scaled.values()],
    )


StackUpdate = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def stack_update(
    shape: MatrixShape, polar: Polar, reducer: Reducer, compile: bool | str
) -> StackUpdate:
    """Return the function from (N, V) of a batch of matrices of `shape` to (U, new V)."""
    if compile:
        backend = compile if isinstance(compile, str) else "inductor"
        return _compiled(shape, polar, reducer, backend)
    return functools.partial(_stack_update, shape=shape, polar=polar, reducer=reducer)


@functools.cache
def _compiled(shape: MatrixShape, polar: Polar, reducer: Reducer, backend: str) -> StackUpdate:
    """Compile for one shape, apart from all others, so that no number of shapes reaches a limit.

    torch counts recompilations per code object, so every shape compiles a copy of its own.
    """

    def update(N_NMK: Tensor, V_NM1: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _stack_update(N_NMK, V_NM1, shape=shape, polar=polar, reducer=reducer)

    update.__code__ = update.__code__.replace()
    return torch.compile(update, backend=backend, dynamic=False)


def part_update(
    N_NMK: Tensor,
    V_NM1: Tensor | None,
    *,
    shape: MatrixShape,
    polar: Polar,
    team: Subgroup,
    segments: Segments,
) -> tuple[Tensor, Tensor | None]:
    """Return (U, new V) of this rank's part of matrices that a team shares; a collective of it."""
    N_NMK = _rounded(N_NMK, polar.wire)
    O_NMK = orthogonalize_part(N_NMK, shape, team, polar.coefficients, segments, polar.dtype)
    reducer = SubgroupReducer(team, divided_axis(shape))
    return _after_polar(O_NMK.to(N_NMK.dtype), V_NM1, shape, polar, reducer)


def _stack_update(
    N_NMK: Tensor, V_NM1: Tensor | None, *, shape: MatrixShape, polar: Polar, reducer: Reducer
) -> tuple[Tensor, Tensor | None]:
    steps = polar.coefficients.steps
    N_NMK = _rounded(N_NMK, polar.wire)
    O_NMK = orthogonalize(N_NMK, polar.coefficients, steps, polar.form, polar.dtype)
    return _after_polar(O_NMK.to(N_NMK.dtype), V_NM1, shape, polar, reducer)


def _after_polar(
    U_NMK: Tensor, V_NM1: Tensor | None, shape: MatrixShape, polar: Polar, reducer: Reducer
) -> tuple[Tensor, Tensor | None]:
    last = None
    if (norm := resolve_post_norm(polar.post_norm)) is not None:
        context = NormContext(
            shape=shape, eps=polar.post_norm_eps, beta2=polar.normuon_beta2, reducer=reducer
        )
        U_NMK, V_NM1 = norm.apply(U_NMK, V_NM1, context)
        last = norm.last
    if polar.scale == "rms_exact":
        sums = reducer.sum_all(U_NMK.square())
        U_NMK = U_NMK.mul_(exact_factor(sums, shape, polar.rms))
    else:
        U_NMK = U_NMK.mul_(shape_factor(polar.scale, shape, polar.rms, last))
    return _rounded(U_NMK, polar.wire), V_NM1


def _rounded(X: Tensor, dtype: torch.dtype) -> Tensor:
    return X.to(dtype).to(X.dtype) if dtype.itemsize < X.dtype.itemsize == 4 else X


def apply_updates_(
    W: Weights,
    U: list[Tensor],
    *,
    lr: float,
    rate: float,
    cautious: bool = False,
    mask: Tensor | None = None,
) -> None:
    """Write `W <- (1 - rate)*W - lr*U`, rounded once where `W` is narrower than `U`.

    The decay takes nothing of the shape factor within `U`. See `decay_` for `rate` and `cautious`.
    """
    new_W = W.wide(U, mask)
    decay_(new_W, U, rate, cautious=cautious)
    torch._foreach_add_(new_W, U, alpha=-lr)
    W.write_(new_W, mask)
