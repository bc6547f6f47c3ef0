"""The polar factor of a batch of matrices, by Newton-Schulz.

For `X = U S V^T` the polar factor is `U V^T`. Newton-Schulz replaces every singular value `s` by
`p(...p(s))` with the polynomials of `muonscale.optim.newton_schulz.coefficients`, which brings it near 1 with
matrix products alone.

Shapes: N matrices, M rows, K columns, S = min(M, K).
Not yet run on GPU.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz.coefficients import Coefficients, CoefficientsLike, resolve
from muonscale.optim.newton_schulz.exact_polar import exact_polar as exact_polar
from muonscale.optim.newton_schulz.flops import choose_segments
from muonscale.optim.newton_schulz.flops import ns_flops as ns_flops
from muonscale.optim.newton_schulz.gram import Segments, make_workspace, newton_schulz_
from muonscale.optim.newton_schulz.kernels.cpu_threads import run_side_by_side
from muonscale.optim.newton_schulz.kernels.products import panel_rows
from muonscale.optim.newton_schulz.subgroup import Subgroup

WORKSPACE_BYTES = 256 * 2**20
"""Cap on the temporaries of one batch of matrices; assumption, untested."""

CACHE_BYTES = 4 * 2**20
"""The same for one thread of a CPU, so that they stay in its caches; measured: EXPERIMENTS.md, "Batches"."""

_FAR = 1e12
"""Largest magnitude, and the inverse of the least, whose squares are summed without scaling."""

DTypeLike = torch.dtype | str
"""A dtype, its name, or "auto"."""

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The dtypes that can be asked for by name."""


@torch.no_grad()
def orthogonalize(
    X: Tensor,
    coefficients: CoefficientsLike = "jordan",
    steps: int = 5,
    form: str = "auto",
    dtype: DTypeLike = "auto",
    *,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """Return the approximate polar factor of every matrix in `X`.

    Per step `X <- a*X + (b*A + c*A@A) @ X` with `A = X @ X.T`, on the orientation in which `A` is
    the smaller Gram matrix. Before the first step each matrix is divided by what the coefficients
    are meant for, such as its Frobenius norm; no epsilon is added, so that the result does not
    depend on the length of `X`, and a zero matrix stays zero.

    Args:
        X: `[..., out, in]`, any floating dtype; not written to.
        coefficients: name, triple, list of triples or `Coefficients` (see
            `muonscale.optim.newton_schulz.coefficients`).
        steps: number of steps, at least 1.
        form: "direct" as above; "gram", the same polynomial evaluated on `A`, which costs less the
            longer the matrix; "auto" is the one with fewer operations (`muonscale.optim.newton_schulz.flops`).
        dtype: dtype of the products, or its name. "auto" is `ns_dtype(X.device)`, and float64 for float64 `X`.
        workspace_bytes: the batch is cut so that the temporaries stay below this, in bytes; one
            matrix is always worked on whole.

    Returns:
        `[..., out, in]` in the dtype of the products, contiguous. Not differentiable. A matrix
        with a non-finite element becomes non-finite.

    Raises:
        ConfigError: for unknown coefficients, form or dtype, or an `X` that holds no matrix.

    References:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024).
        Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, equation 2.
        Dao-AILab, Gram Newton-Schulz (2026).

    Example:
        >>> import torch
        >>> O = orthogonalize(torch.eye(3) * 1e-20, dtype="float32")
        >>> bool(torch.allclose(O, O[0, 0] * torch.eye(3)))
        True
    """
    if X.ndim < 2:
        raise ConfigError(
            f"a tensor of shape {tuple(X.shape)} holds no matrix: [..., out, in] is accepted"
        )
    resolved = resolve(coefficients, steps)
    dtype = products_dtype(X, dtype)
    segments = choose_segments(X.shape, resolved, form, dtype=dtype, device=X.device)
    polar = torch.empty(X.shape, dtype=dtype, device=X.device)
    if X.numel() == 0:
        return polar
    X_NMK, O_NMK = X.reshape(-1, *X.shape[-2:]), polar.view(-1, *X.shape[-2:])
    count = _batch_length(X_NMK.shape, dtype, X_NMK.device, workspace_bytes)
    parts = list(zip(O_NMK.split(count), X_NMK.split(count), strict=True))
    run = functools.partial(_newton_schulz_each_, coefficients=resolved, segments=segments)
    if X.device.type == "cpu":
        run_side_by_side(run, parts)
    else:
        run(parts)
    return polar


def _newton_schulz_each_(
    parts: list[tuple[Tensor, Tensor]], *, coefficients: Coefficients, segments: Segments
) -> None:
    """Write the Newton-Schulz polynomial of the second of every pair into the first, in one workspace."""
    largest = parts[0][0]
    panel = panel_rows(min(largest.shape[1:]), largest.dtype, largest.device)
    room = make_workspace(largest, segments, panel)
    for O_NMK, X_NMK in parts:
        ready, divided = _ready(X_NMK, coefficients, O_NMK.dtype)
        newton_schulz_(O_NMK, ready, coefficients, segments, room, normalized=divided)


@torch.no_grad()
def orthogonalize_part(
    X_NMK: Tensor,
    shape: tuple[int, int],
    team: Subgroup,
    coefficients: Coefficients,
    segments: Segments,
    dtype: DTypeLike = "auto",
) -> Tensor:
    """Return this rank's part of the polar factors of matrices that a team shares.

    A collective of the team. The polynomial is that of `orthogonalize`.

    Args:
        X_NMK: this rank's part, whole along the shorter side; may be empty.
        shape: (out, in) of the whole matrices.
        team: that shares them.
        coefficients: triples and normalisation.
        segments: how the polynomial is evaluated, see `muonscale.optim.newton_schulz.gram`.
        dtype: as for `orthogonalize`.
    """
    dtype = products_dtype(X_NMK, dtype)
    polar = torch.empty_like(X_NMK, dtype=dtype, memory_format=torch.contiguous_format)
    # of the longest part, so that all members cut alike
    longest = (min(shape), -(-max(shape) // team.size))
    per_matrix = (2 * longest[0] * longest[1] + 4 * longest[0] ** 2) * dtype.itemsize
    count = min(max(1, WORKSPACE_BYTES // per_matrix), X_NMK.shape[0])
    panel = panel_rows(min(shape), dtype, X_NMK.device)
    room = make_workspace(polar[:count], segments, panel, shape=shape, team=team)
    for target, part in zip(polar.split(count), X_NMK.split(count), strict=True):
        ready, divided = _ready(part, coefficients, dtype, team)
        newton_schulz_(target, ready, coefficients, segments, room, normalized=divided)
    return polar


def _ready(
    X_NMK: Tensor, coefficients: Coefficients, dtype: torch.dtype, team: Subgroup | None = None
) -> tuple[Tensor, bool]:
    """Return `X` in `dtype`, contiguous, of a usable size, and whether that is its normalised form.

    In 16 bits `X` is divided by its Frobenius norm in float32, before rounding. Otherwise the
    normalisation waits for the Gram matrix, and `X` is copied only where it must be: to another
    dtype or layout, or because squares of its elements would be out of range.
    """
    X_NMK = X_NMK.to(torch.promote_types(X_NMK.dtype, torch.float32)).contiguous()
    # Not vector_norm(inf): on a CPU that takes ten times as long.
    largest = _largest(X_NMK, team)
    if dtype.itemsize < 4:
        X_NMK = X_NMK / largest.masked_fill_(largest == 0, 1.0)
        # Now the norm is at least 1, or 0 for a zero matrix: no eps is needed, and none is used.
        norm = torch.linalg.vector_norm(X_NMK, dim=(-2, -1), keepdim=True)
        if team is not None:
            norm = team.sum_(norm.square_()).sqrt_()
        norm = norm.clamp_(min=1.0)
        rounded = X_NMK.div_(norm.mul_(coefficients.margin)).to(dtype)
        return rounded, coefficients.normalization == "frobenius"
    usable = (largest > 1 / _FAR) & (largest < _FAR) | (largest == 0)
    # The host may ask only on a CPU; elsewhere it would wait for the device.
    if X_NMK.device.type != "cpu" or not usable.all():
        X_NMK = X_NMK / largest.masked_fill_(usable, 1.0)
    return X_NMK.to(dtype), False


def _largest(X_NMK: Tensor, team: Subgroup | None) -> Tensor:
    if not X_NMK.numel():
        largest = X_NMK.new_zeros(X_NMK.shape[0], 1, 1)
    else:
        largest = torch.maximum(X_NMK.amax((-2, -1), True), X_NMK.amin((-2, -1), True).neg_())
    return largest if team is None else team.max_(largest)


def workspace_size(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str
) -> int:
    """Return about how many bytes `orthogonalize` uses besides `[N, out, in]` and its result."""
    device = torch.device(device)
    count = _batch_length(shape, dtype, device, WORKSPACE_BYTES)
    short, long = sorted(shape[1:])
    # X in the products' dtype, four Gram matrices; in 16 bits X in float32 as well
    each = (short * long + 4 * short * short) * dtype.itemsize
    each += 4 * short * long * (dtype.itemsize < 4)
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    return each * count * min(workers, -(-shape[0] // count))


def _batch_length(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, workspace_bytes: int
) -> int:
    """Return how many matrices to work on at a time: X twice and four Gram matrices within the cap."""
    count, *sides = shape
    short, long = sorted(sides)
    per_matrix = (2 * short * long + 4 * short * short) * dtype.itemsize
    if device.type != "cpu":
        return min(max(1, workspace_bytes // per_matrix), count)
    threads = torch.get_num_threads()
    batches = -(-count // max(1, min(workspace_bytes // threads, CACHE_BYTES) // per_matrix))
    if batches > 1:  # as many for every thread
        batches += -batches % threads
    return -(-count // batches)


def products_dtype(X: Tensor, dtype: DTypeLike) -> torch.dtype:
    """Return the dtype of the products for `X` that `dtype`, a name or "auto" stands for.

    Raises:
        ConfigError: for an unknown name.
    """
    return resolve_dtype(dtype, X.dtype, X.device)


def resolve_dtype(dtype: DTypeLike, of: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Return the same for tensors in the dtype `of` on a device, which need not be there by name."""
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
