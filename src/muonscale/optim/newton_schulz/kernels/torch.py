"""Matrix products by torch's own kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def product_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    bias: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """Write `beta * bias + alpha * left @ right`, all `[N, ., .]`, into `out`.

    Without `bias` it writes `left @ right`. A single matrix is multiplied without its batch axis,
    because batched products in 16 bits on a CPU copy operands that are not contiguous.
    """
    if left.shape[0] == 1:
        if bias is None:
            torch.mm(left[0], right[0], out=out[0])
        else:
            torch.addmm(bias[0], left[0], right[0], beta=beta, alpha=alpha, out=out[0])
    elif bias is None:
        torch.bmm(left, right, out=out)
    else:
        torch.baddbmm(bias, left, right, beta=beta, alpha=alpha, out=out)
