"""The exact polar factor: what Newton-Schulz approximates, and the oracle it is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def exact_polar(X: Tensor) -> Tensor:
    """Return the polar factor `U V^T` of every matrix in `X` from an SVD in float64.

    Singular values below `max(out, in) * 2.2e-16` of the largest count as zero and contribute
    nothing, so that a zero matrix has the polar factor zero.

    Args:
        X: `[..., out, in]`, any floating dtype.

    Returns:
        `[..., out, in]`, float64.

    References:
        Higham, Functions of Matrices (2008), theorem 8.1.
    """
    U, S, Vh = torch.linalg.svd(X.to(torch.float64), full_matrices=False)
    tolerance = max(X.shape[-2:]) * torch.finfo(torch.float64).eps
    kept = (tolerance * S.amax(-1, keepdim=True) < S).to(torch.float64)
    return (U * kept.unsqueeze(-2)) @ Vh
