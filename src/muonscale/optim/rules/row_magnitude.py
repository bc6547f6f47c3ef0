"""Rows trained as a magnitude and a direction: Muown.

Each row of a matrix is `W = g * D/r`, with a magnitude g, a direction D and its length r. Muon
updates D by the gradient that D has, and Adam updates g:

    u = W/g        G_g = sum_j G*u        G_D = (g/r) * (G - u*G_g)
    D <- r*u - lr*U        r <- ||D||        g <- Adam(g, G_g)        W <- g * D/r

D is not stored: it follows from W, g and r. A step therefore needs four sums over each row, two
before the momentum and two after the update has arrived, and four values per row of state. A
sharded row needs two all-reduces of two numbers; a row that is whole on its rank needs none.

Everything below is `[rows]`: one value per row of all logical matrices of a parameter, in order.

References:
    Lion et al., Muown, arXiv 2605.10797, algorithm 1 and appendix C; kcc-lion/muown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from muonscale.optim.matrices.local import LocalMatrices
from muonscale.optim.rules.master_weights import Weights
from muonscale.optim.rules.nonfinite import zero_unless_

MAGNITUDE = "row_magnitude"
LENGTH = "row_direction_length"
EXP_AVG = "row_exp_avg"
EXP_AVG_SQ = "row_exp_avg_sq"
STEP = "row_step"
ROW_STATES = (MAGNITUDE, LENGTH, EXP_AVG, EXP_AVG_SQ)

LEAST_LENGTH = 1e-12
"""The magnitude that a row of zeros is given, so that it has a gradient; as NVIDIA's code does."""


@dataclass(frozen=True, kw_only=True)
class RowStep:
    """What is known of the rows of a parameter before the update of their directions."""

    inverse: Tensor
    """`1/g` before the step."""
    length: Tensor
    """r before the step."""
    magnitude: Tensor
    """g after the step."""

    @classmethod
    def cat(cls, steps: Sequence[RowStep]) -> RowStep:
        """Return the rows of several parameters together."""
        names = [f.name for f in fields(cls)]
        return cls(**{name: torch.cat([getattr(step, name) for step in steps]) for name in names})


def gradient_sums(W: Weights, G: list[Tensor], matrices: list[LocalMatrices]) -> Tensor:
    """Return `[2, rows]`: the sums of `W*W` and `W*G` over what of each row is on this rank.

    Args:
        W: weights.
        G: gradients in the dtype of the state.
        matrices: the matrices of each weight.
    """
    pairs = zip(W.copies(G), G, matrices, strict=True)
    return torch.cat(
        [torch.stack([own.row_dot(w, w), own.row_dot(w, g)]) for w, g, own in pairs], 1
    )


def update_sums(W: Weights, U: list[Tensor], matrices: list[LocalMatrices]) -> Tensor:
    """Return `[2, rows]`: the same sums of `U*U` and `W*U`."""
    pairs = zip(W.copies(U), U, matrices, strict=True)
    return torch.cat(
        [torch.stack([own.row_dot(u, u), own.row_dot(w, u)]) for w, u, own in pairs], 1
    )


def step_magnitudes(
    sums: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any], steps: int
) -> tuple[RowStep, dict[str, Tensor], Tensor, Tensor]:
    """Step the magnitudes, and return how to make the gradient of the directions.

    The magnitude is the length that a row has, with the sign of its state, so that other code may
    write to the weight (a clip, a checkpoint).

    Args:
        sums: from `gradient_sums`, over all ranks.
        state: by name; zeros before the first step.
        group: options: lr, betas, eps.
        steps: number of steps with this one.

    Returns:
        The step, the new state by name without LENGTH, and (a, b) of `G_D = a*G - b*W`.
    """
    norms = sums[0].sqrt().clamp_min(LEAST_LENGTH)
    g = norms.copysign(state[MAGNITUDE])
    r = torch.where(state[LENGTH] == 0, norms, state[LENGTH])
    gradient = sums[1] / g
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    m = state[EXP_AVG].lerp(gradient, 1 - beta1)
    v = state[EXP_AVG_SQ].lerp(gradient.square(), 1 - beta2)
    root = (v / (1 - beta2**steps)).sqrt() + group["eps"]
    magnitude = g - lr * (m / (1 - beta1**steps)) / root
    step = RowStep(inverse=1 / g, length=r, magnitude=magnitude)
    return step, {MAGNITUDE: magnitude, EXP_AVG: m, EXP_AVG_SQ: v}, g / r, gradient / r


def direction_gradients_(
    W: Weights, G: list[Tensor], matrices: list[LocalMatrices], a: Tensor, b: Tensor
) -> None:
    """Write the gradients of the directions, `a*G - b*W`, into `G`."""
    counts = [own.rows for own in matrices]
    each = zip(W.copies(G), G, matrices, a.split(counts), b.split(counts), strict=True)
    for w, g, own, of_gradient, of_weight in each:
        own.scale_rows_(g, of_gradient)
        g.sub_(own.scale_rows_(w, of_weight))


def factors(sums: Tensor, step: RowStep, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (keep, move) of `W <- keep*W - move*U`, and the new length of the directions.

    Args:
        sums: from `update_sums`, over all ranks.
        step: from `step_magnitudes`.
        lr: learning rate.
    """
    r = step.length
    square = r * r - 2 * lr * r * step.inverse * sums[1] + lr * lr * sums[0]
    length = square.clamp_min(0.0).sqrt()
    scale = step.magnitude / length.masked_fill(length == 0, 1.0)
    return scale * r * step.inverse, scale * lr, length


def apply_rows_(
    W: Weights,
    U: list[Tensor],
    matrices: list[LocalMatrices],
    keep: Tensor,
    move: Tensor,
    *,
    rate: float,
    cautious: bool,
    mask: Tensor | None,
) -> None:
    """Write `W <- keep*W - move*U - rate*W`; if `cautious`, decay only where `W*move*U >= 0`.

    Args:
        W: weights.
        U: updates; written to.
        matrices: the matrices of each weight.
        keep: from `factors`.
        move: from `factors`.
        rate: see `decay_`.
        cautious: see `decay_`.
        mask: 0-D bool; false leaves `W` as it is. None counts as true.
    """
    new_W = W.wide(U)
    counts = [own.rows for own in matrices]
    each = zip(new_W, U, matrices, keep.split(counts), move.split(counts), strict=True)
    for w, u, own, kept, moved in each:
        own.scale_rows_(u, moved)
        if cautious:
            u.addcmul_(w, (w * u).ge_(0), value=rate)
        factor = kept if cautious else kept - rate
        own.scale_rows_(w, factor if mask is None else torch.where(mask, factor, 1.0))
    zero_unless_(mask, U)
    torch._foreach_sub_(new_W, U)
    W.write_(new_W)
