"""The polar factor of a batch of matrices, by Newton-Schulz.

For `X = U S V^T` the polar factor is `U V^T`. Newton-Schulz replaces every singular value `s` by
`p(...p(s))`, which is near 1, with the polynomials of `coefficients`. It needs only matrix
products. The iteration is `newton_schulz_`.

Shapes: N matrices, M rows, K columns, S = min(M, K).
Not yet run on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import math
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz.coefficients import Coefficients, CoefficientsLike, resolve
from muonscale.optim.newton_schulz.flops import Segments, choose_segments
from muonscale.optim.newton_schulz.flops import ns_flops as ns_flops
from muonscale.optim.newton_schulz.kernels import symmetric_product, taken_kernel
from muonscale.optim.newton_schulz.kernels.cpu import (
    can_run_side_by_side,
    empty_squares,
    is_on_host,
    run_side_by_side,
)
from muonscale.optim.newton_schulz.kernels.torch import product_
from muonscale.optim.newton_schulz.subgroup import Subgroup

WORKSPACE_BYTES = 256 * 2**20
"""Limit of the temporaries of one batch of matrices. An assumption; untested."""

CACHE_BYTES = 4 * 2**20
"""The same for one thread of a CPU, so that they stay in its caches. Measured: EXPERIMENTS.md,
"Batches"."""

_FAR = 1e12
"""Squares of magnitudes between 1/_FAR and _FAR are summed without scaling."""

DTypeLike = torch.dtype | str
"""A dtype, its name, or "auto"."""

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Dtypes of products by name."""


@torch.no_grad()
def orthogonalize(
    X: Tensor,
    coefficients: CoefficientsLike = "jordan",
    steps: int = 5,
    form: str = "auto",
    dtype: DTypeLike = "auto",
    *,
    kernel: str = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """Return the approximate polar factor of every matrix in `X`.

    Each step is `X <- a*X + (b*A + c*A@A) @ X` with `A = X @ X.T`, or from the right with `A = X.T
    @ X` if that is smaller. Before the first step each matrix is divided by the norm of the
    coefficients, such as its Frobenius norm. No epsilon is added: the result does not depend on the
    length of `X`, and a zero matrix stays zero.

    Args:
        X: `[..., out, in]`, any floating dtype; not written to.
        coefficients: name, triple, list of triples or `Coefficients`; see `resolve`.
        steps: number of steps, at least 1.
        form: "direct", as above; "gram", the same polynomial evaluated on `A`, cheaper for long
            matrices; or "auto", see `choose_segments`.
        dtype: dtype of the products, or its name. "auto" is float64 for float64 `X`, and otherwise
            `ns_dtype(X.device)`.
        kernel: of the symmetric products: "torch", with panels on a CPU; "triton"; or "auto", see
            `kernels.taken_kernel`.
        workspace_bytes: limit of the temporaries in bytes. A single matrix may exceed it.

    Returns:
        `[..., out, in]` in the dtype of the products, contiguous. Not differentiable. A matrix
        with a non-finite element becomes non-finite.

    Raises:
        ConfigError: if coefficients, form or dtype are unknown, `X` has fewer than two axes, or
            the kernel is "triton" and cannot run.

    References:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024).
        Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, equation 2.
        Dao-AILab, Gram Newton-Schulz (2026).

    Examples:
        >>> import torch
        >>> O = orthogonalize(torch.eye(3) * 1e-20, dtype="float32")
        >>> bool(torch.allclose(O, O[0, 0] * torch.eye(3)))
        True
    """
    if X.ndim < 2:
        raise ConfigError(
            f"a tensor of shape {tuple(X.shape)} holds no matrix: it must be [..., out, in]"
        )
    resolved = resolve(coefficients, steps)
    dtype = resolve_dtype(dtype, X.dtype, X.device)
    segments = choose_segments(X.shape, resolved, form, dtype=dtype, device=X.device, kernel=kernel)
    polar = torch.empty(X.shape, dtype=dtype, device=X.device)
    if X.numel() == 0:
        return polar
    X_NMK, O_NMK = X.reshape(-1, *X.shape[-2:]), polar.view(-1, *X.shape[-2:])
    count = _batch_length(X_NMK.shape, dtype, X_NMK.device, workspace_bytes)
    # Elsewhere the host does not wait for norms, and one reduction serves all batches.
    units = [None] * -(-len(X_NMK) // count) if is_on_host(X) else _units(X_NMK).split(count)
    batches = list(zip(O_NMK.split(count), X_NMK.split(count), units, strict=True))
    # Triton's interpreter is not made for several threads.
    threads = is_on_host(X) and taken_kernel(kernel) != "triton"
    if threads and can_run_side_by_side(len(batches)):
        run = functools.partial(newton_schulz_, coefficients=resolved, segments=segments)
        run_side_by_side(run, batches)
    else:
        newton_schulz_(batches, resolved, segments, kernel=kernel)
    return polar


def newton_schulz_(
    batches: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    coefficients: Coefficients,
    segments: Segments,
    *,
    shape: tuple[int, int] | None = None,
    subgroup: Subgroup | None = None,
    kernel: str = "auto",
) -> None:
    """Write the Newton-Schulz polynomial of every matrix in `X` into `O`, for all (O, X, unit).

    A segment of one step is the direct form, `X <- a*X + (b*A + c*A@A) @ X` with `A = X @ X.T`. A
    longer segment is the Gram form: each of its steps multiplies `X` by a polynomial of the first
    `A`, so it takes the product `Q` of these polynomials from S x S matrices alone and ends with
    `X <- Q @ X`; the next segment restarts from that `X`. In exact arithmetic all segments give the
    same polynomial. A tall matrix is multiplied from the right, with `A = X.T @ X`.

    Args:
        batches: `O` and `X` of `[n, M, K]`, the first with the largest n. `O` is contiguous, in the
            dtype of the products, and overwritten; `X` is not written to. `unit` is from `_units`,
            or None to find it where it is needed.
        coefficients: triples and normalization.
        segments: lengths that add up to the number of triples.
        shape: (out, in) of the whole matrices, if `X` holds parts of them.
        subgroup: the ranks that share the matrices.
        kernel: as for `orthogonalize`.

    References:
        Dao-AILab, Gram Newton-Schulz (2026), for the Gram form and its restarts.
    """
    like = batches[0][0]
    rows, columns = shape or like.shape[1:]
    side, tall = min(rows, columns), rows > columns
    symmetric_, panel = symmetric_product(side, like.dtype, like.device, kernel)
    square_ = symmetric_ if subgroup is None else subgroup.product_
    squares = [empty_squares(like, len(like), side, panel) for _ in range(4)]
    spare = torch.empty_like(like) if len(segments) > 1 else like
    for O_NMK, X, unit in batches:
        X, normalized = _prepare(X, unit, coefficients, O_NMK.dtype, subgroup)
        A, Z, Q, T = (square[: len(X)] for square in squares)
        triples = iter(coefficients.triples)
        for left, length in zip(range(len(segments), 0, -1), segments, strict=True):
            target = O_NMK if left % 2 else spare[: len(X)]  # the last segment writes to O
            symmetric_(A, *((X.mT, X) if tall else (X, X.mT)))  # A = X X^T
            if subgroup is not None:
                subgroup.sum_(A)
            first = left == len(segments) and not normalized
            scale = _take_scale_(A, coefficients) if first else None  # A of the normalized X
            for step, (a, b, c) in enumerate(itertools.islice(triples, length), 1):
                if c == 0:
                    torch.mul(A, b, out=Z)
                else:
                    square_(Z, A, A, bias=A, beta=b, alpha=c)  # Z = b A + c A A
                if length == 1 and scale is None:
                    product_(target, *((X, Z) if tall else (Z, X)), bias=X, beta=a)  # a X + Z X
                    break
                if step < length:  # A <- (a I + Z) A (a I + Z)
                    square_(T, A, Z, bias=A, beta=a)
                    square_(A, T, Z, bias=T, beta=a)
                if step == 1:  # Q = a I + Z
                    Z.diagonal(dim1=-2, dim2=-1).add_(a)
                    Q, Z = Z, Q
                else:  # Q <- (a I + Z) Q
                    square_(T, Q, Z, bias=Q, beta=a)
                    Q, T = T, Q
            else:  # X <- Q X
                if scale is not None:  # Q takes the scale, since X itself was not divided
                    Q.mul_(scale.mT)
                product_(target, *((X, Q.mT) if tall else (Q, X)))
            X = target


def _prepare(
    X_NMK: Tensor,
    unit: Tensor | None,
    coefficients: Coefficients,
    dtype: torch.dtype,
    subgroup: Subgroup | None,
) -> tuple[Tensor, bool]:
    """Return `X` in `dtype`, contiguous, with squares in range, and whether it is normalized.

    In 16 bits `X` is divided by its Frobenius norm in float32, before rounding. Otherwise the
    normalization happens after the first Gram matrix, and `X` is copied only if its dtype or layout
    changes, or if squares of its elements would be out of range.
    """
    X_NMK = X_NMK.to(torch.promote_types(X_NMK.dtype, torch.float32)).contiguous()
    norm = None
    if unit is None and subgroup is None and not torch.compiler.is_compiling():
        norm = torch.linalg.vector_norm(X_NMK, dim=(-2, -1), keepdim=True)
        # No magnitude is above the norm, and the largest is at least norm / sqrt(M K).
        least = 2 * math.prod(X_NMK.shape[1:]) ** 0.5 / _FAR
        if not ((norm > least) & (norm < _FAR / 2)).all():  # so for a NaN
            norm = None
    if norm is None:
        X_NMK = X_NMK / (_units(X_NMK, subgroup) if unit is None else unit)
    if dtype.itemsize >= 4:
        return X_NMK.to(dtype), False
    if norm is None:
        norm = torch.linalg.vector_norm(X_NMK, dim=(-2, -1), keepdim=True)
    if subgroup is not None:
        norm = subgroup.sum_(norm.square_()).sqrt_()
    # No eps is added: a zero matrix is divided by 1.
    norm = norm.masked_fill_(norm == 0, 1.0).mul_(coefficients.margin)
    unit_X = torch.div(X_NMK, norm, out=torch.empty_like(X_NMK, dtype=dtype))
    return unit_X, coefficients.normalization == "frobenius"


def _units(X_NMK: Tensor, subgroup: Subgroup | None = None) -> Tensor:
    """Return the number by which to divide each matrix so that squares are in range: `[N, 1, 1]`.

    It is the largest magnitude where the squares would be out of range, and 1 elsewhere.
    """
    if not X_NMK.numel():
        largest = X_NMK.new_zeros(X_NMK.shape[0], 1, 1)
    elif is_on_host(X_NMK):  # vector_norm(inf) takes ten times as long on a CPU
        largest = torch.maximum(X_NMK.amax((-2, -1), True), X_NMK.amin((-2, -1), True).neg_())
    else:
        largest = torch.linalg.vector_norm(X_NMK, math.inf, (-2, -1), keepdim=True)
    largest = largest.to(torch.promote_types(X_NMK.dtype, torch.float32))
    if subgroup is not None:
        subgroup.max_(largest)
    usable = (largest > 1 / _FAR) & (largest < _FAR) | (largest == 0)
    return largest.masked_fill(usable, 1.0)


def _take_scale_(A_NSS: Tensor, coefficients: Coefficients) -> Tensor:
    """Return the normalization `D` as a column `[N, S or 1, 1]`, and write `D A D` into `A`.

    A zero matrix, or a zero row under "aol", has the scale 0 and stays zero.
    """
    wide = A_NSS.to(torch.promote_types(A_NSS.dtype, torch.float32))
    if coefficients.normalization == "aol":
        squared = wide.abs().sum(-1, keepdim=True)
    else:
        squared = wide.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1)
    if coefficients.normalization == "schatten4":
        # Relative to the trace, so that the squares of squares stay in range.
        unit = wide / squared.masked_fill(squared == 0, 1.0)
        squared = squared * torch.linalg.vector_norm(unit, dim=(-2, -1), keepdim=True)
    scale = squared.rsqrt().masked_fill_(squared == 0, 0.0).div_(coefficients.margin)
    scale = scale.to(A_NSS.dtype)
    A_NSS.mul_(scale).mul_(scale.mT)
    return scale


@torch.no_grad()
def orthogonalize_part(
    X_NMK: Tensor,
    shape: tuple[int, int],
    subgroup: Subgroup,
    coefficients: Coefficients,
    segments: Segments,
    dtype: DTypeLike = "auto",
    kernel: str = "auto",
) -> Tensor:
    """Return this rank's part of the polar factors of matrices that a subgroup shares.

    A collective of the subgroup. The polynomial is that of `orthogonalize`.

    Args:
        X_NMK: this rank's part, whole along the shorter side; may be empty.
        shape: (out, in) of the whole matrices.
        subgroup: the ranks that share them.
        coefficients: triples and normalization.
        segments: as for `newton_schulz_`.
        dtype: as for `orthogonalize`.
        kernel: as for `orthogonalize`, for the products with `X`.
    """
    dtype = resolve_dtype(dtype, X_NMK.dtype, X_NMK.device)
    polar = torch.empty_like(X_NMK, dtype=dtype, memory_format=torch.contiguous_format)
    # All members cut the batch at the same places, given by the longest part.
    longest = (min(shape), -(-max(shape) // subgroup.size))
    per_matrix = (2 * longest[0] * longest[1] + 4 * longest[0] ** 2) * dtype.itemsize
    count = min(max(1, WORKSPACE_BYTES // per_matrix), X_NMK.shape[0])
    parts = zip(polar.split(count), X_NMK.split(count), strict=True)
    batches = [(polar_part, X, None) for polar_part, X in parts]
    newton_schulz_(batches, coefficients, segments, shape=shape, subgroup=subgroup, kernel=kernel)
    return polar


@torch.no_grad()
def exact_polar(X: Tensor) -> Tensor:
    """Return the polar factor `U V^T` of every matrix in `X` from an SVD in float64.

    Newton-Schulz approximates it. Singular values below `max(out, in) * 2.2e-16` of the largest
    count as zero and contribute nothing, so the polar factor of a zero matrix is zero.

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


def workspace_size(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str
) -> int:
    """Return the approximate bytes of `orthogonalize` besides its `[N, out, in]` and its result."""
    device = torch.device(device)
    count = _batch_length(shape, dtype, device, WORKSPACE_BYTES)
    short, long = sorted(shape[1:])
    # X in the dtype of the products and four Gram matrices; in 16 bits also X in float32.
    each = (short * long + 4 * short * short) * dtype.itemsize
    each += 4 * short * long * (dtype.itemsize < 4)
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    return each * count * min(workers, -(-shape[0] // count))


def _batch_length(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, workspace_bytes: int
) -> int:
    """Return the number of matrices per batch: X twice and four Gram matrices must fit."""
    count, *sides = shape
    short, long = sorted(sides)
    per_matrix = (2 * short * long + 4 * short * short) * dtype.itemsize
    if device.type != "cpu":
        return min(max(1, workspace_bytes // per_matrix), count)
    threads = torch.get_num_threads()
    batches = -(-count // max(1, min(workspace_bytes // threads, CACHE_BYTES) // per_matrix))
    if batches > 1:  # the same number for every thread
        batches += -batches % threads
    return -(-count // batches)


def resolve_dtype(dtype: DTypeLike, of: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Return the dtype of the products for a tensor of dtype `of` on `device`.

    Args:
        dtype: a dtype, its name, or "auto", see `orthogonalize`.
        of: dtype of the tensor.
        device: device of the tensor. It is asked for its capability only if `dtype` is "auto".

    Raises:
        ConfigError: if the name is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ConfigError(
            f"no dtype for Newton-Schulz is called {dtype!r}; accepted: auto, {', '.join(DTYPES)}"
        )
    return torch.float64 if of == torch.float64 else ns_dtype(device)


def ns_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 if `device` multiplies it fast, and float32 otherwise.

    A CPU without bf16 instructions multiplies bf16 matrices up to a hundred times more slowly than
    fp32 ones. Measured without them: 1 against 115-135 GFLOP/s on two cores; with AVX512_BF16:
    170-200 against 60-95 on one core of an AMD EPYC.
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
    """Ask oneDNN, and on x86 also the instruction set, because oneDNN accepts any AVX-512."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
