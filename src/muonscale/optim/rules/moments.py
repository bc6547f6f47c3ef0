"""Running averages of gradients and of their squares, and the dtype in which they are computed.

Letters: G gradient, M first moment, V second moment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muonscale.optim.rules.nonfinite import number_if, or_zeros, zero_unless_


def average_(M: list[Tensor], G: list[Tensor], beta: float, mask: Tensor | None) -> None:
    """Write `M <- beta*M + (1-beta)*G`, all of one device, unless `mask` (0-D bool) is false."""
    if mask is None:
        torch._foreach_lerp_(M, G, 1 - beta)
        return
    changes = list(torch._foreach_sub(G, M))
    zero_unless_(mask, changes)
    torch._foreach_add_(M, changes, alpha=1 - beta)


def average_squares_(V: list[Tensor], G: list[Tensor], beta: float, mask: Tensor | None) -> None:
    """Write `V <- beta*V + (1-beta)*G*G`, as `average_`."""
    torch._foreach_mul_(V, number_if(mask, beta, 1.0, V))
    G = or_zeros(mask, G)
    torch._foreach_addcmul_(V, G, G, 1 - beta)


def widened(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Return `tensors` in the dtypes of `like`: those that already have theirs as they are."""
    wide = [
        tensor if tensor.dtype == other.dtype else torch.empty_like(tensor, dtype=other.dtype)
        for tensor, other in zip(tensors, like, strict=True)
    ]
    write_(wide, tensors)
    return wide


def write_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy `values` into `targets`, unless they are the same tensors."""
    pairs = [(t, v) for t, v in zip(targets, values, strict=True) if t is not v]
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [value for _, value in pairs])
