# pyrefly: ignore-errors
"""Symmetric products by a Triton kernel: half of the tiles are computed, the others mirrored.

The module imports Triton, so only `kernels.symmetric_product` imports it, when it is asked for.
Checked in Triton's interpreter on a CPU and by compiling for a GPU; not yet run on one.

Shapes: N matrices, S side of the product, K contracted side.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from muonscale.optim.newton_schulz.kernels import TILE

CONTRACTED_TILE = 32
"""Contracted elements that are loaded at a time. An assumption, as are the next two."""
WARPS = 4
STAGES = 3


def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernel, which works on a CPU."""
    return not isinstance(symmetric_kernel, triton.JITFunction)


def triton_product_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    bias: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """Write `beta * bias + alpha * left @ right` into `out`. It must be symmetric, which is not checked.

    Sums are in float32. The result is exactly symmetric: what is above the diagonal is mirrored.

    Args:
        out: `[N, S, S]`, bfloat16 or float16 as all others, any strides; overwritten.
        left: `[N, S, K]`.
        right: `[N, K, S]`.
        bias: `[N, S, S]`, symmetric and not `out`; or None.
        beta: factor of `bias`.
        alpha: factor of the product; 1 without a bias, as in `product_`.
    """
    count, side, contracted = left.shape
    if not count or not side:
        return
    tiles = -(-side // TILE)
    pairs = tiles * (tiles + 1) // 2
    added = out if bias is None else bias
    symmetric_kernel[(count * pairs,)](
        *(out, left, right, added),
        *(side, contracted, tiles, pairs),
        *(beta, alpha if bias is not None else 1.0),
        *(*out.stride(), *left.stride(), *right.stride(), *added.stride()),
        HAS_BIAS=bias is not None,
        TILE=TILE,
        CONTRACTED_TILE=CONTRACTED_TILE,
        WIDEN=is_interpreted(),
        num_warps=WARPS,
        num_stages=STAGES,
    )


@triton.jit
def symmetric_kernel(
    out: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    bias: tl.tensor,
    side: tl.tensor,
    contracted: tl.tensor,
    tiles: tl.tensor,
    pairs: tl.tensor,
    beta: tl.tensor,
    alpha: tl.tensor,
    out_n: tl.tensor,
    out_row: tl.tensor,
    out_column: tl.tensor,
    left_n: tl.tensor,
    left_row: tl.tensor,
    left_k: tl.tensor,
    right_n: tl.tensor,
    right_k: tl.tensor,
    right_column: tl.tensor,
    bias_n: tl.tensor,
    bias_row: tl.tensor,
    bias_column: tl.tensor,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    CONTRACTED_TILE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Compute one tile on or above the diagonal, and store it twice.

    Rows r and tiles - 1 - r of the triangle have tiles + 1 tiles together, so pair p is in the
    first of them or, past its end, in the second.
    """
    n = (tl.program_id(0) // pairs).to(tl.int64)
    pair = tl.program_id(0) % pairs
    fold = pair // (tiles + 1)
    place = pair % (tiles + 1)
    in_first = place < tiles - fold
    tile_row = tl.where(in_first, fold, tiles - 1 - fold)
    tile_column = tile_row + tl.where(in_first, place, place - (tiles - fold))

    rows = (tile_row * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (tile_column * TILE + tl.arange(0, TILE)).to(tl.int64)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, contracted, CONTRACTED_TILE):
        ks = (start + tl.arange(0, CONTRACTED_TILE)).to(tl.int64)
        left_tile = tl.load(
            left + n * left_n + rows[:, None] * left_row + ks[None, :] * left_k,
            mask=(rows[:, None] < side) & (ks[None, :] < contracted),
            other=0.0,
        )
        right_tile = tl.load(
            right + n * right_n + ks[:, None] * right_k + columns[None, :] * right_column,
            mask=(ks[:, None] < contracted) & (columns[None, :] < side),
            other=0.0,
        )
        if WIDEN:  # the interpreter would multiply the bits of bfloat16 as integers
            left_tile, right_tile = left_tile.to(tl.float32), right_tile.to(tl.float32)
        total = tl.dot(left_tile, right_tile, total)
    total = total * alpha
    inside = (rows[:, None] < side) & (columns[None, :] < side)
    if HAS_BIAS:
        added = bias + n * bias_n + rows[:, None] * bias_row + columns[None, :] * bias_column
        total += beta * tl.load(added, mask=inside, other=0.0).to(tl.float32)
    # A tile on the diagonal mirrors its own upper triangle.
    total = tl.where(rows[:, None] <= columns[None, :], total, tl.trans(total))
    result = total.to(out.dtype.element_ty)
    base = out + n * out_n
    tl.store(base + rows[:, None] * out_row + columns[None, :] * out_column, result, mask=inside)
    mirrored = (columns[:, None] < side) & (rows[None, :] < side)
    place_of_mirror = base + columns[:, None] * out_row + rows[None, :] * out_column
    tl.store(place_of_mirror, tl.trans(result), mask=mirrored)
