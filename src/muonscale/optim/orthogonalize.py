"""The polar factor of a batch of matrices, by Newton-Schulz, and its exact form by SVD.

For `X = U S V^T` the polar factor is `U V^T`. Newton-Schulz replaces every singular value `s` by
`p(...p(s))` with the polynomials of `muonscale.optim.coefficients`, which brings it near 1 with
matrix products alone.

Shapes: N matrices, M rows, K columns, S = min(M, K).
Not yet run on GPU.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from muonscale.errors import ConfigError
from muonscale.optim.coefficients import CoefficientsLike, Triple, resolve_triples

WORKSPACE_BYTES = 256 * 2**20
"""Cap on the temporaries of one batch of matrices; assumption, untested."""

DTypeLike = torch.dtype | str
"""A dtype, its name, or "auto"."""

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
"""The dtypes that can be asked for by name."""


@torch.no_grad()
def orthogonalize(
    X: Tensor,
    coefficients: CoefficientsLike = "jordan",
    steps: int = 5,
    dtype: DTypeLike = "auto",
    *,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """Return the approximate polar factor of every matrix in `X`.

    Per step `X <- a*X + (b*A + c*A@A) @ X` with `A = X @ X.T`, on the orientation in which `A` is
    the smaller Gram matrix. Before the first step each matrix is divided by its largest magnitude
    and then by its Frobenius norm, in float32 at least, so that the result does not depend on the
    length of `X`, and a zero matrix stays zero.

    Args:
        X: `[..., out, in]`, any floating dtype; not written to.
        coefficients: name, triple or list of triples (see `muonscale.optim.coefficients`).
        steps: number of steps, at least 1.
        dtype: dtype of the products, or its name. "auto" is `ns_dtype(X.device)`, and float64 for float64 `X`.
        workspace_bytes: the batch is cut so that the temporaries stay below this, in bytes; one
            matrix is always worked on whole.

    Returns:
        `[..., out, in]` in the dtype of the products, contiguous. Not differentiable. A matrix
        with a non-finite element becomes non-finite.

    Raises:
        ConfigError: for unknown coefficients, or an `X` that holds no matrix.

    References:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024).
        Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, equation 2.

    Example:
        >>> import torch
        >>> O = orthogonalize(torch.eye(3) * 1e-20, dtype="float32")
        >>> bool(torch.allclose(O, O[0, 0] * torch.eye(3)))
        True
    """
    if X.ndim < 2:
        raise ConfigError(
            f"a tensor of shape {tuple(X.shape)} holds no matrix: [..., out, in] does"
        )
    triples = resolve_triples(coefficients, steps)
    dtype = _products_dtype(X, dtype)
    if X.numel() == 0:
        return torch.empty_like(X, dtype=dtype)
    X_NMK = X.reshape(-1, *X.shape[-2:])
    chunk = _chunk_length(X_NMK.shape, dtype, workspace_bytes)
    parts = [_newton_schulz(_normalized(part, dtype), triples) for part in X_NMK.split(chunk)]
    O_NMK = parts[0] if len(parts) == 1 else torch.cat(parts)
    return O_NMK.view(X.shape)


def _newton_schulz(X_NMK: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Apply the polynomials to contiguous `X_NMK`, which is overwritten.

    A tall matrix is multiplied from the right, `X @ (b*A + c*A@A)` with `A = X.T @ X`: the same
    polynomial as that of the transpose, without transposing. Only contiguous outputs are fast.
    """
    tall = X_NMK.shape[1] > X_NMK.shape[2]
    short = min(X_NMK.shape[1:])
    A_NSS = X_NMK.new_empty(X_NMK.shape[0], short, short)
    B_NSS = torch.empty_like(A_NSS)
    Y_NMK = torch.empty_like(X_NMK)
    for a, b, c in triples:
        left, right = (X_NMK.mT, X_NMK) if tall else (X_NMK, X_NMK.mT)
        torch.bmm(left, right, out=A_NSS)
        torch.baddbmm(A_NSS, A_NSS, A_NSS, beta=b, alpha=c, out=B_NSS)
        left, right = (X_NMK, B_NSS) if tall else (B_NSS, X_NMK)
        torch.baddbmm(X_NMK, left, right, beta=a, out=Y_NMK)
        X_NMK, Y_NMK = Y_NMK, X_NMK
    return X_NMK


def _normalized(X_NMK: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `X / ||X||_F` per matrix in `dtype`, new and contiguous; computed in float32 at least."""
    X_NMK = X_NMK.to(torch.promote_types(X_NMK.dtype, torch.float32)).contiguous()
    # Not vector_norm(inf): on a CPU that takes ten times as long.
    largest = torch.maximum(X_NMK.amax((-2, -1), True), X_NMK.amin((-2, -1), True).neg_())
    X_NMK = X_NMK / largest.masked_fill_(largest == 0, 1.0)
    # Now the norm is at least 1, or 0 for a zero matrix: no eps is needed, and none is used.
    norm = torch.linalg.vector_norm(X_NMK, dim=(-2, -1), keepdim=True).clamp_(min=1.0)
    return X_NMK.div_(norm).to(dtype)


def _chunk_length(shape: Sequence[int], dtype: torch.dtype, workspace_bytes: int) -> int:
    """Return how many matrices fit the cap: X twice, the Gram matrix and its polynomial."""
    short, long = sorted(shape[1:])
    per_matrix = (2 * short * long + 2 * short * short) * dtype.itemsize
    return max(1, workspace_bytes // per_matrix)


def _products_dtype(X: Tensor, dtype: DTypeLike) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ConfigError(
            f"no dtype for Newton-Schulz is called {dtype!r}: auto, {', '.join(DTYPES)}"
        )
    return torch.float64 if X.dtype == torch.float64 else ns_dtype(X.device)


def ns_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype that "auto" stands for on `device`: bfloat16 where it is fast, else float32.

    A CPU without bf16 instructions multiplies bf16 matrices up to a hundred times more slowly than
    fp32 ones (measured without: 1 against 115-135 GFLOP/s on two cores; with AVX512_BF16: 170-200
    against 60-95 on one core of an AMD EPYC).
    """
    device = torch.device(device)
    index = device.index if device.index is not None else 0
    return torch.bfloat16 if _fast_bf16(device.type, index) else torch.float32


@functools.cache
def _fast_bf16(device_type: str, index: int) -> bool:
    if device_type == "cpu":
        return _cpu_has_bf16_products()
    if device_type == "cuda":
        return torch.cuda.get_device_capability(index) >= (8, 0)
    return False


def _cpu_has_bf16_products() -> bool:
    """Ask oneDNN, and on x86 the instruction set too: oneDNN says yes to any AVX-512."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def ns_flops(shape: Sequence[int], steps: int) -> int:
    """Return the floating-point operations of `steps` Newton-Schulz steps on `[..., out, in]`.

    `steps * (4*S^2*L + 2*S^3)` per matrix with short side S and long side L.

    Example:
        >>> ns_flops((2, 3), 1)
        64
    """
    *leading, rows, columns = shape
    short, long = min(rows, columns), max(rows, columns)
    return math.prod(leading) * steps * (4 * short * short * long + 2 * short**3)


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
