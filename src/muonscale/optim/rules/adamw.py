"""AdamW with decoupled weight decay, as a function of tensors.

Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2, with
eps added after the bias correction of the second moment, as torch.optim.AdamW has it.

Letters: G gradient, M first moment, V second moment, W weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muonscale.optim.options import AdamWOptions
from muonscale.optim.rules.base import Group, Rule, StateTensor, register
from muonscale.optim.rules.decay import decay_
from muonscale.optim.rules.master_weights import Weights
from muonscale.optim.rules.moments import average_, average_squares_, widened
from muonscale.optim.rules.nonfinite import or_zeros


class AdamWRule(Rule):
    """The AdamW rule: elementwise, in one pass if this rank does the whole step."""

    name = "adamw"
    options = AdamWOptions
    elements_touched = 7  # gradient, two moments and the weight read, all but the gradient written

    def state(self, group: Group) -> tuple[StateTensor, ...]:
        """Return both moments, and the number of steps for their bias correction."""
        count = StateTensor("step", per="parameter")
        return StateTensor("exp_avg"), StateTensor("exp_avg_sq", negative=False), count

    def direction_(
        self, state: Mapping[str, list[Any]], G: list[Tensor], group: Group, mask: Tensor | None
    ) -> list[Tensor]:
        """Write one step into the moments, and return U."""
        M, V, steps = state["exp_avg"], state["exp_avg_sq"], state["step"]
        return adamw_updates_(G, M, V, steps, betas=group["betas"], eps=group["eps"], mask=mask)

    def step_(
        self,
        W: Weights,
        G: list[Tensor],
        state: Mapping[str, list[Any]],
        group: Group,
        *,
        lr: float,
        rate: float,
        mask: Tensor | None,
    ) -> None:
        """Write one step into weights and moments."""
        adamw_step_(
            W,
            G,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            lr=lr,
            rate=rate,
            cautious=group["cautious_decay"],
            betas=group["betas"],
            eps=group["eps"],
            mask=mask,
        )


def adamw_step_(
    W: Weights,
    G: list[Tensor],
    M: list[Tensor],
    V: list[Tensor],
    steps: Sequence[int],
    *,
    lr: float,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    cautious: bool = False,
    mask: Tensor | None = None,
) -> None:
    """Write one AdamW step into `W`, `M` and `V`.

        M <- b1*M + (1-b1)*G        V <- b2*V + (1-b2)*G*G
        W <- (1 - rate)*W - lr/(1-b1^t) * M / (sqrt(V)/sqrt(1-b2^t) + eps)

    Args:
        W: parameters, any floating dtype; the rest has their shapes.
        G: gradients; not written to.
        M: first moments, float32 or float64.
        V: second moments, float32 or float64.
        steps: t of each parameter, this step included (from 1).
        lr: scheduled learning rate.
        rate: part of the weight that decays, see `decay_rate`.
        betas: (b1, b2), each in [0, 1).
        eps: added to the root of the corrected second moment.
        cautious: see `decay_`; the update has the sign of `M`.
        mask: 0-D bool; false leaves everything as it is. None counts as true.
    """
    if not cautious and _fits_kernel(W, G, M, V):
        found_inf = None if mask is None else (~mask).to(M[0].device, torch.float32)
        torch._fused_adamw_(
            W.stored,
            G,
            M,
            V,
            [],
            _as_tensors(steps, M),
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=rate / lr if lr else 0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )
        return
    denominators = adamw_moments_(G, M, V, steps, betas=betas, eps=eps, mask=mask)
    new_W = W.wide(M)
    decay_(new_W, M, rate, cautious=cautious, mask=mask)
    factors = [-lr / (1 - betas[0] ** t) for t in steps]
    torch._foreach_addcdiv_(new_W, or_zeros(mask, M), denominators, factors)
    W.write_(new_W)


FUSED_DEVICES = ("cpu", "cuda")
"""Devices on which torch has a kernel for a whole AdamW step in one pass over memory."""


def _fits_kernel(W: Weights, G: list[Tensor], M: list[Tensor], V: list[Tensor]) -> bool:
    """Return whether torch's fused kernel can take all tensors in one call.

    They must be contiguous, of one dtype and on one device, without float32 copies and without
    stochastic rounding. If the kernel took only some of them, the rounding of a parameter would
    depend on whether others of its group are in 16 bits or transposed.
    """
    first = M[0]
    return (
        first.device.type in FUSED_DEVICES
        and W.masters is None
        and W.roundings is None
        and all(
            len({(t.dtype, t.device) for t in tensors} | {(first.dtype, first.device)}) == 1
            and all(map(Tensor.is_contiguous, tensors))
            for tensors in (W.stored, G, M, V)
        )
    )


def _as_tensors(steps: Sequence[int], M: list[Tensor]) -> list[Tensor]:
    """Return each count as a 0-D float32 tensor on the moments' device; equal ones share it."""
    counts = {t: torch.full((), float(t), device=M[0].device) for t in set(steps)}
    return [counts[t] for t in steps]


def adamw_updates_(
    G: list[Tensor],
    M: list[Tensor],
    V: list[Tensor],
    steps: Sequence[int],
    *,
    betas: tuple[float, float],
    eps: float,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Write one step into the moments, and return U of `W <- (1 - rate)*W - lr*U`."""
    denominators = adamw_moments_(G, M, V, steps, betas=betas, eps=eps, mask=mask)
    torch._foreach_mul_(denominators, [1 - betas[0] ** t for t in steps])
    return list(torch._foreach_div(M, denominators))


def adamw_moments_(
    G: list[Tensor],
    M: list[Tensor],
    V: list[Tensor],
    steps: Sequence[int],
    *,
    betas: tuple[float, float],
    eps: float,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Write one step into the moments, and return `sqrt(V)/sqrt(1-b2^t) + eps`."""
    beta1, beta2 = betas
    wide_G = widened(G, M)
    average_(M, wide_G, beta1, mask)
    average_squares_(V, wide_G, beta2, mask)
    denominators = list(torch._foreach_sqrt(V))
    torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in steps])
    torch._foreach_add_(denominators, eps)
    if mask is not None:  # before a first step V is 0, and eps may be too small for its dtype
        torch._foreach_clamp_min_(denominators, torch.finfo(torch.float32).tiny)
    return denominators


ADAMW = register(AdamWRule())
