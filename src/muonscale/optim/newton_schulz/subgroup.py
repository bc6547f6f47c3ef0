"""One matrix worked on by several ranks, none of which holds all of it.

The long side is divided. Each member forms its part of the Gram matrix, and one all-reduce sums
them; products of Gram matrices are divided by rows and gathered, or done by every member where
gathering would take longer. What each member ends with is its own part of the polar factor.

Shapes: N matrices, S their short side; the rest is a member's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from muonscale.optim.newton_schulz.coefficients import Triple
from muonscale.optim.newton_schulz.kernels.torch import product_

AxisT = Literal["rows", "columns"]


ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
"""What this release of torch calls the gathering of equal tensors into one."""


def all_gather_single(
    received: Tensor, sent: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """Call torch's function of that name, under the name that this release has for it."""
    return getattr(dist, ALL_GATHER)(received, sent, group=group, async_op=async_op)


@dataclass(frozen=True)
class Subgroup:
    """This rank among those that share a matrix."""

    group: dist.ProcessGroup
    place: int
    size: int
    divided: bool = True
    """Whether products of Gram matrices are divided, too."""

    def sum_(self, X: Tensor) -> Tensor:
        """Write the sum over all members into `X`."""
        whole = X.contiguous()
        dist.all_reduce(whole, group=self.group)
        return X if whole is X else X.copy_(whole)

    def max_(self, X: Tensor) -> Tensor:
        """Write the largest over all members into `X`, contiguous."""
        dist.all_reduce(X, dist.ReduceOp.MAX, group=self.group)
        return X

    def product_(
        self,
        C_NSS: Tensor,
        A_NSS: Tensor,
        B_NSS: Tensor,
        *,
        bias: Tensor | None = None,
        beta: float = 0.0,
        alpha: float = 1.0,
    ) -> None:
        """Write `beta * bias + alpha * A @ B` into `C`, the rows of it divided among the members."""
        if not self.divided:
            product_(C_NSS, A_NSS, B_NSS, bias=bias, beta=beta, alpha=alpha)
            return
        count, side, _ = C_NSS.shape
        each = -(-side // self.size)
        rows = slice(min(self.place * each, side), min((self.place + 1) * each, side))
        mine = C_NSS.new_zeros(count, each, side)
        if rows.start < rows.stop:
            product_(
                mine[:, : rows.stop - rows.start],
                A_NSS[:, rows],
                B_NSS,
                bias=None if bias is None else bias[:, rows],
                beta=beta,
                alpha=alpha,
            )
        # every member's block is padded to the same number of rows
        blocks = C_NSS.new_empty(self.size * count, each, side)
        all_gather_single(blocks, mine, self.group)
        together = blocks.view(self.size, count, each, side).transpose(0, 1)
        C_NSS.copy_(together.reshape(count, self.size * each, side)[:, :side])


@dataclass(frozen=True)
class SubgroupReducer:
    """Sums over whole matrices of which each member has a part: see `Reducer`."""

    subgroup: Subgroup
    axis: AxisT
    """What is divided."""

    def sum_rows(self, X_NMK: Tensor) -> Tensor:
        """Return `[N, 1, K]`."""
        return self._over("rows", X_NMK.sum(-2, keepdim=True))

    def sum_cols(self, X_NMK: Tensor) -> Tensor:
        """Return `[N, M, 1]`."""
        return self._over("columns", X_NMK.sum(-1, keepdim=True))

    def sum_all(self, X_NMK: Tensor) -> Tensor:
        """Return `[N, 1, 1]`."""
        return self.subgroup.sum_(X_NMK.sum((-2, -1), keepdim=True))

    def _over(self, axis: AxisT, sums: Tensor) -> Tensor:
        return self.subgroup.sum_(sums) if axis == self.axis else sums


def divided_axis(shape: tuple[int, int]) -> AxisT:
    """Return which axis of a matrix (out, in) is divided: the longer."""
    return "rows" if shape[0] > shape[1] else "columns"


@dataclass(frozen=True)
class SplitCost:
    """What a member of a subgroup does for one matrix."""

    flops: int
    elements: int
    """That it sends to the others."""


def split_cost(
    shape: tuple[int, int],
    triples: Sequence[Triple],
    segments: tuple[int, ...],
    size: int,
    *,
    divided: bool,
) -> SplitCost:
    """Return the cost of a matrix (out, in) for each of `size` members.

    Per segment: its part of the Gram matrix, an all-reduce of that (2*(size-1)/size of it are sent),
    its part of the product with X; per product of Gram matrices, of which there are as many as in
    `muonscale.optim.newton_schulz.flops.segment_flops`, a share of it and a share to gather, or all of it.
    """
    short, long = min(shape), max(shape)
    own = -(-long // size)
    squares, first = 0, 0
    for length in segments:
        squares += sum(1 for _, _, c in triples[first : first + length] if c != 0)
        squares += 3 * (length - 1)
        first += length
    rows = -(-short // size) if divided else short
    flops = len(segments) * 4 * short * short * own + squares * 2 * rows * short * short
    elements = len(segments) * 2 * short * short * (size - 1) // size
    if divided:
        elements += squares * rows * short * (size - 1)
    return SplitCost(flops, elements)


def best_split(
    shape: tuple[int, int],
    triples: Sequence[Triple],
    forms: Sequence[tuple[int, ...]],
    size: int,
    per_element: float,
) -> tuple[float, tuple[int, ...], bool]:
    """Return (cost, segments, divided) of the cheapest way to split a matrix over `size` members.

    Args:
        shape: (out, in).
        triples: of the polynomial.
        forms: segments to choose from.
        size: members.
        per_element: operations that sending an element is worth.
    """
    ways = []
    for segments in forms:
        for divided in (False, True):
            cost = split_cost(shape, triples, segments, size, divided=divided)
            ways.append((cost.flops + per_element * cost.elements, segments, divided))
    return min(ways)


def part_of(length: int, place: int, size: int) -> tuple[int, int]:
    """Return the range of a side of `length` that a member works on."""
    each = -(-length // size)
    return min(place * each, length), min((place + 1) * each, length)
