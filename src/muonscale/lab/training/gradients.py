"""Norms and clipping of raw gradients, before the optimizer sees them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer


def gradient_norms(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the Frobenius norm of each group's gradients, by group name, 0-D tensors."""
    return {group["name"]: _norm(group["params"]) for group in optimizer.param_groups}


def clip_gradients(
    optimizer: Optimizer,
    norms: dict[str, Tensor],
    *,
    max_norm: float,
    clip: Literal["adamw", "all"],
) -> None:
    """Scale the gradients of the clipped groups so that their joint norm is at most `max_norm`.

    Under `clip="adamw"` the groups of the Muon rule keep their gradients: the length of a Muon step
    does not depend on them.

    Args:
        optimizer: its groups have `name` and `rule`.
        norms: what `gradient_norms` returned.
        max_norm: largest joint norm.
        clip: groups of the AdamW rule only, or all groups together.
    """
    groups = [g for g in optimizer.param_groups if clip == "all" or g["rule"] == "adamw"]
    grads = [p.grad for g in groups for p in g["params"] if p.grad is not None]
    if not grads:
        return
    joint = torch.linalg.vector_norm(torch.stack([norms[g["name"]] for g in groups]))
    torch._foreach_mul_(grads, (max_norm / (joint + 1e-12)).clamp(max=1.0))


def _norm(params: list[Tensor]) -> Tensor:
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros((), device=params[0].device)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
