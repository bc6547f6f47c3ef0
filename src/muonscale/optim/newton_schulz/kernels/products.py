"""Products that are known to be symmetric: the lower half is computed, the rest is mirrored.

`X @ X.T` is symmetric, and so is the product of two symmetric matrices that commute, as polynomials
of one matrix do. Row panel i of such a product needs columns 0 to the end of panel i only:
(p + 1) / (2p) of the multiplications with p panels.

Shapes: N matrices, S side of the product, K contracted.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL_ROWS = 128
"""Rows of a panel; measured: EXPERIMENTS.md, "Symmetric products by panels"."""

ROW_GAP_BYTES = 64
"""Unused bytes between rows; measured likewise."""

SMALLEST_SIDE: dict[torch.dtype, int] = {torch.float32: 256, torch.float64: 256}
"""Side from which panels pay on a CPU; measured likewise."""
SMALLEST_SIDE_IN_16_BITS = 512
"""The same in 16 bits, where the products are faster and the mirroring is not."""


def panel_rows(side: int, dtype: torch.dtype, device: torch.device | str) -> int:
    """Return the rows per panel for a product of `side`: all of them where panels do not pay.

    On devices other than a CPU products are whole: panels have not been tried there.
    """
    pays = side >= SMALLEST_SIDE.get(dtype, SMALLEST_SIDE_IN_16_BITS)
    return PANEL_ROWS if pays and torch.device(device).type == "cpu" else max(side, 1)


def empty_squares(like: Tensor, count: int, side: int, panel: int) -> Tensor:
    """Return `[count, side, side]`, unfilled, in the dtype and on the device of `like`.

    For panels the rows are set apart by a cache line: where they are a power of two long, those of a
    block to be mirrored would fall on the same few places of the cache.
    """
    gap = ROW_GAP_BYTES // like.dtype.itemsize if panel < side else 0
    return like.new_empty(count, side, side + gap)[..., :side]


def symmetric_flops(side: int, contracted: int, panel: int) -> int:
    """Return the floating-point operations of one symmetric product computed in panels of `panel` rows.

    Example:
        >>> symmetric_flops(256, 10, 256), symmetric_flops(256, 10, 128)
        (1310720, 983040)
    """
    return sum(2 * (stop - start) * contracted * stop for start, stop in _spans(side, panel))


def symmetric_product_(
    C_NSS: Tensor,
    A_NSK: Tensor,
    B_NKS: Tensor,
    panel: int,
    *,
    bias: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """Write `beta * bias + alpha * A @ B`, which the caller knows to be symmetric, into `C`.

    Args:
        C_NSS: `[N, S, S]`, contiguous along its last axis; overwritten.
        A_NSK: `[N, S, K]`.
        B_NKS: `[N, K, S]`.
        panel: rows of a panel; `S` or more for one whole product without mirroring.
        bias: `[N, S, S]`, symmetric, not `C`; left out if None.
        beta: factor of `bias`.
        alpha: factor of the product.
    """
    for start, stop in _spans(C_NSS.shape[-1], panel):
        rows, columns = slice(start, stop), slice(0, stop)
        added = None if bias is None else bias[:, rows, columns]
        left, right = A_NSK[:, rows], B_NKS[:, :, columns]
        product_(C_NSS[:, rows, columns], left, right, bias=added, beta=beta, alpha=alpha)
        if start:
            C_NSS[:, :start, rows].copy_(C_NSS[:, rows, :start].mT)


def product_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    bias: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """Write `beta * bias + alpha * left @ right`, all `[N, ., .]`, into `out`; without `bias`, `left @ right`.

    A single matrix goes through the products of matrices: on a CPU in 16 bits those of batches copy
    what is not contiguous.
    """
    batched = left.shape[0] != 1
    if not batched:
        out, left, right = out[0], left[0], right[0]
    if bias is None:
        (torch.bmm if batched else torch.mm)(left, right, out=out)
        return
    added = bias if batched else bias[0]
    multiply_add = torch.baddbmm if batched else torch.addmm
    multiply_add(added, left, right, beta=beta, alpha=alpha, out=out)


def _spans(side: int, panel: int) -> list[tuple[int, int]]:
    return [(start, min(start + panel, side)) for start in range(0, side, panel)]
