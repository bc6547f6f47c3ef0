"""The rules once more, slow and obvious: one matrix at a time, in float64.

These functions share no code with the fast ones. Tests hold the fast ones against them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def newton_schulz(X: Tensor, triples: list[tuple[float, float, float]]) -> Tensor:
    """Return `p_k(...p_1(X / ||X||_F))`, with `p(X) = aX + b(XX^T)X + c(XX^T)(XX^T)X`.

    Args:
        X: `[out, in]`.
        triples: (a, b, c) of each step.

    Returns:
        `[out, in]`, float64; zeros for zeros.

    References:
        Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, equation 2.
    """
    X = X.to(torch.float64)
    norm = X.square().sum().sqrt()
    if norm == 0:
        return X
    X = X / norm
    for a, b, c in triples:
        gram = X @ X.T
        X = a * X + b * gram @ X + c * gram @ gram @ X
    return X


def muon_step(
    W: Tensor,
    G: Tensor,
    M: Tensor,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    triples: list[tuple[float, float, float]],
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Return the weight and the momentum `[out, in]`, float64, after one Muon step.

    References:
        Liu et al., arXiv 2502.16982, equations 1 and 4, with `M <- mu*M + (1-mu)*G`.
    """
    W, G, M = W.to(torch.float64), G.to(torch.float64), M.to(torch.float64)
    M = momentum * M + (1 - momentum) * G
    direction = momentum * M + (1 - momentum) * G if nesterov else M
    update = factor * newton_schulz(direction, triples)
    return W - lr * weight_decay * W - lr * update, M


def adamw_step(
    W: Tensor,
    G: Tensor,
    M: Tensor,
    V: Tensor,
    step: int,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, first and second moment, float64, after AdamW step number `step` (from 1).

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.
    """
    W, G, M, V = (tensor.to(torch.float64) for tensor in (W, G, M, V))
    M = betas[0] * M + (1 - betas[0]) * G
    V = betas[1] * V + (1 - betas[1]) * G**2
    corrected_M = M / (1 - betas[0] ** step)
    corrected_V = V / (1 - betas[1] ** step)
    return W - lr * weight_decay * W - lr * corrected_M / (corrected_V.sqrt() + eps), M, V
