"""The rules again, in their simplest form: one matrix at a time, in float64.

These functions share no code with the fast ones. Tests compare the fast ones with them.

Letters: W weight `[out, in]`, G gradient, M momentum, V second moment, O polar factor, U update.
Shapes: M rows (out), K columns (in).
"""

from __future__ import annotations

import math
from collections.abc import Callable

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


def pre_normalized(N_MK: Tensor, pre_norm: str | None, polar: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the direction after its pre-normalization; what has no length stays zero.

    References:
        Chang et al., MuonEq, arXiv 2603.28254; Aurora, arXiv 2606.27715.
    """
    N_MK = N_MK.to(torch.float64)
    if pre_norm == "sign":
        return N_MK.sign()
    if pre_norm == "aurora":
        if N_MK.shape[0] < N_MK.shape[1]:
            return pre_normalized(N_MK.T, pre_norm, polar).T
        if N_MK.shape[0] == N_MK.shape[1]:
            return N_MK
        X = pre_normalized(N_MK, "row", polar)
        lengths = [float(row.norm()) for row in polar(X)]
        return torch.stack([row / (c or 1.0) for row, c in zip(X, lengths, strict=True)])
    result = N_MK.clone()
    for i in range(N_MK.shape[0]):
        for j in range(N_MK.shape[1]):
            if pre_norm in ("row", "row_col"):
                result[i, j] /= float(N_MK[i].norm()) or 1.0
            if pre_norm in ("col", "row_col"):
                result[i, j] /= float(N_MK[:, j].norm()) or 1.0
    return result


def unit_rows(O_MK: Tensor, eps: float) -> Tensor:
    """Return `O` with every row divided by `sqrt(sum of its squares + eps)`.

    References:
        Zhang et al., Muon+, arXiv 2602.21545, equation 4.
    """
    rows = [row / math.sqrt(sum(x * x for x in row.tolist()) + eps) for row in O_MK]
    return torch.stack(rows)


def unit_columns(O_MK: Tensor, eps: float) -> Tensor:
    """Return `O` with every column divided by `sqrt(sum of its squares + eps)`."""
    return unit_rows(O_MK.T, eps).T


def frobenius(O_MK: Tensor, eps: float) -> Tensor:
    """Return `O` at the Frobenius norm of an exact polar factor, `sqrt(min(out, in))`."""
    return O_MK * math.sqrt(min(O_MK.shape)) / math.sqrt(float(O_MK.square().sum()) + eps)


def normuon(O_MK: Tensor, V: Tensor, beta2: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return `O` with row i divided by `sqrt(V_i) + eps`, at its old length, and the new V `[out]`.

    References:
        Li et al., NorMuon, arXiv 2510.05491, algorithm 1; length kept as in its code.
    """
    V = V.to(torch.float64).clone()
    U = O_MK.clone()
    for i in range(O_MK.shape[0]):
        mean = float(O_MK[i].square().sum()) / O_MK.shape[1]
        V[i] = beta2 * V[i] + (1 - beta2) * mean
        U[i] = O_MK[i] / (math.sqrt(float(V[i])) + eps)
    length = float(U.norm())
    return (U if length == 0 else U * float(O_MK.norm()) / length), V


def post_normalized(
    O_MK: Tensor, post_norm: str | None, V: Tensor, beta2: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `O` after its post-normalization, and the row state `[out]` that "normuon" changes."""
    if post_norm == "row":
        return unit_rows(O_MK, eps), V
    if post_norm == "col":
        return unit_columns(O_MK, eps), V
    if post_norm == "row_col":
        return unit_columns(unit_rows(O_MK, eps), eps), V
    if post_norm == "col_row":
        return unit_rows(unit_columns(O_MK, eps), eps), V
    if post_norm == "frobenius":
        return frobenius(O_MK, eps), V
    if post_norm == "normuon":
        return normuon(O_MK, V, beta2, eps)
    assert post_norm is None
    return O_MK, V


def scaled(
    O_MK: Tensor,
    scale: str | float | Callable[[int, int], float],
    rms: float,
    post_norm: str | None,
) -> Tensor:
    """Return `O` times its shape factor, see `muonscale.optim.rules.scale.shape_factor`."""
    out, in_ = O_MK.shape
    if callable(scale):
        return O_MK * scale(out, in_)
    if not isinstance(scale, str):
        return O_MK * scale
    if scale == "rms_exact":
        realised = math.sqrt(float(O_MK.square().mean()))
        return O_MK if realised == 0 else O_MK * rms / realised
    if scale == "rms":
        if post_norm in ("row", "col_row"):
            return O_MK * rms * math.sqrt(in_)
        if post_norm in ("col", "row_col"):
            return O_MK * rms * math.sqrt(out)
        return O_MK * rms * math.sqrt(max(out, in_))
    if scale == "spectral":
        return O_MK * math.sqrt(out / in_)
    if scale == "keller":
        return O_MK * math.sqrt(max(1, out / in_))
    assert scale == "none"
    return O_MK


def decayed(W: Tensor, U: Tensor, rate: float, cautious: bool) -> Tensor:
    """Return `W - rate*W`, if `cautious` only where subtracting `U` brings `W` nearer to zero.

    References:
        Chen et al., Cautious Weight Decay, arXiv 2510.12402, algorithm 1.
    """
    if cautious:
        return torch.where(W * U >= 0, W - rate * W, W)
    return W - rate * W


def constrained(
    W: Tensor, U: Tensor, lr: float, constraint: str | None, outward_scale: float
) -> Tensor:
    """Return the decayed weight after an update, see `muonscale.optim.rules.constraint`."""
    if constraint == "weight_norm":
        if not W.any() or not U.any():
            return W
        V = W - lr * float(W.norm()) * U / float(U.norm())
        return V * float(W.norm()) / float(V.norm())
    V = W - lr * U
    if constraint == "radial_brake" and V.norm() > W.norm():
        return V / V.norm() * (W.norm() + outward_scale * (V.norm() - W.norm()))
    return V


def muon_step(
    W: Tensor,
    G: Tensor,
    M: Tensor,
    V: Tensor | None = None,
    *,
    lr: float,
    rate: float,
    momentum: float,
    nesterov: bool,
    triples: list[tuple[float, float, float]],
    scale: str | Callable[[int, int], float] = "rms",
    rms: float = 0.2,
    V_elements: Tensor | None = None,
    V_update: Tensor | None = None,
    skipped: Tensor | None = None,
    row_fraction: float = 1.0,
    second_moment_beta: float = 0.95,
    second_moment_eps: float = 1e-10,
    pre_norm: str | None = None,
    post_norm: str | None = None,
    post_norm_eps: float = 1e-8,
    normuon_beta2: float = 0.95,
    cautious: bool = False,
    constraint: str | None = None,
    outward_scale: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight and the momentum `[out, in]` and the row state `[out]` after one Muon step.

    `V_elements` and `V_update` are the second moments of the gradient and of the polar factor,
    float64, if there is one; they are written to. So is `skipped`, `[out]`: 1 for rows that were
    not among the largest `row_fraction` of the step, whose momentum does not decay in the next one.
    `rate` is the part of the weight that decays: lr*wd, or wd times the schedule's multiplier.

    References:
        Liu et al., arXiv 2502.16982, equations 1 and 4, with `M <- mu*M + (1-mu)*G`; Ahn et al.,
        Dion2, arXiv 2512.16928, for `row_fraction`.
    """
    W, G, M = W.to(torch.float64), G.to(torch.float64), M.to(torch.float64).clone()
    V = torch.zeros(W.shape[0], dtype=torch.float64) if V is None else V
    held = torch.zeros_like(V) if skipped is None else skipped
    for i in range(M.shape[0]):
        M[i] = (1 if held[i] else momentum) * M[i] + (1 - momentum) * G[i]
    direction = momentum * M + (1 - momentum) * G if nesterov else M
    if V_elements is not None:  # written to
        beta = second_moment_beta
        V_elements.copy_(beta * V_elements + (1 - beta) * G**2)
        direction = direction / (V_elements.sqrt() + second_moment_eps)

    def polar(X: Tensor) -> Tensor:
        return newton_schulz(X, triples)

    by_size = sorted(range(len(W)), key=lambda i: -float(direction[i].abs().sum()))
    chosen = sorted(by_size[: max(1, math.ceil(row_fraction * len(W)))])
    O_MK = polar(pre_normalized(direction[chosen], pre_norm, polar))
    if V_update is not None:  # written to
        V_update.copy_(second_moment_beta * V_update + (1 - second_moment_beta) * O_MK**2)
        divided = O_MK / (V_update.sqrt() + second_moment_eps)
        if divided.any():
            O_MK = divided * float(O_MK.norm()) / float(divided.norm())
    V = V.to(torch.float64).clone()
    O_MK, V[chosen] = post_normalized(O_MK, post_norm, V[chosen], normuon_beta2, post_norm_eps)
    updated = torch.zeros_like(W)
    updated[chosen] = O_MK
    if skipped is not None:  # written to
        skipped.copy_(torch.tensor([float(i not in chosen) for i in range(len(W))]))
    U = scaled(updated, scale, rms, post_norm)
    if constraint != "weight_norm":
        W = decayed(W, U, rate, cautious)
    return constrained(W, U, lr, constraint, outward_scale), M, V


def row_magnitude_step(
    W: Tensor,
    G: Tensor,
    M: Tensor,
    rows: dict[str, Tensor],
    step: int,
    *,
    lr: float,
    rate: float,
    momentum: float,
    nesterov: bool,
    triples: list[tuple[float, float, float]],
    betas: tuple[float, float],
    eps: float,
    rms: float = 0.2,
    cautious: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return weight and momentum, float64, after Muown step number `step` (from 1).

    `rows` are g (magnitude), r (length of the direction) and the moments m and v of g, `[out]`
    each, float64; written to. Start with zeros.

    References:
        Lion et al., Muown, arXiv 2605.10797, algorithm 1 and appendix C.
    """
    W, G, M = W.to(torch.float64), G.to(torch.float64), M.to(torch.float64)
    g, r, m, v = (rows[name] for name in ("g", "r", "m", "v"))
    D, gradient = torch.zeros_like(W), torch.zeros_like(W)
    for i in range(W.shape[0]):
        norm = max(float(W[i].norm()), 1e-12)
        if step == 1:
            g[i], r[i] = norm, norm
        g[i] = math.copysign(norm, g[i])
        unit = W[i] / g[i]
        along = float(G[i] @ unit)
        D[i] = r[i] * unit
        gradient[i] = g[i] / r[i] * (G[i] - along * unit)
        m[i] = betas[0] * m[i] + (1 - betas[0]) * along
        v[i] = betas[1] * v[i] + (1 - betas[1]) * along**2
    M = momentum * M + (1 - momentum) * gradient
    direction = momentum * M + (1 - momentum) * gradient if nesterov else M
    U = scaled(newton_schulz(direction, triples), "rms", rms, None)
    D = D - lr * U
    new_W = torch.zeros_like(W)
    for i in range(W.shape[0]):
        root = math.sqrt(v[i] / (1 - betas[1] ** step)) + eps
        g[i] = g[i] - lr * m[i] / (1 - betas[0] ** step) / root
        r[i] = D[i].norm()
        new_W[i] = g[i] * D[i] / r[i]
        change = g[i] / r[i] * U[i]
        new_W[i] += decayed(W[i], change, rate, cautious) - W[i]
    return new_W, M


def adamw_step(
    W: Tensor,
    G: Tensor,
    M: Tensor,
    V: Tensor,
    step: int,
    *,
    lr: float,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    cautious: bool = False,
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
    U = corrected_M / (corrected_V.sqrt() + eps)
    return decayed(W, U, rate, cautious) - lr * U, M, V


def stochastic_bfloat16(x: float, random: int) -> float:
    """Return the bfloat16 below or above `x` in magnitude, for `random` in [0, 65535].

    The one above is taken where the part of the way to it, in 65536ths, exceeds `65535 - random`.
    """
    if x == 0 or not math.isfinite(x):
        return x
    _, exponent = math.frexp(abs(x))
    spacing = 2.0 ** (max(exponent, -125) - 8)
    below = math.floor(abs(x) / spacing)
    part = (abs(x) / spacing - below) * 65536
    return math.copysign((below + (part + random >= 65536)) * spacing, x)
