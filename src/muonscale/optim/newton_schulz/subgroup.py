"""Newton-Schulz of one matrix on several ranks, none of which holds the whole matrix.

The long side is divided. Each member computes the Gram matrix of its part, and an all-reduce sums
them. Each member then computes some rows of a product of Gram matrices, and an all-gather joins
them; if that takes longer, every member computes the whole product. The result of a member is its
part of the polar factor.

Shapes: N matrices, S their short side; other sides are those of a member's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from muonscale.optim.newton_schulz.coefficients import Triple
from muonscale.optim.newton_schulz.flops import Segments, count_squares
from muonscale.optim.newton_schulz.kernels.torch import product_

AxisT = Literal["rows", "columns"]

ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
"""The name of the function in this release of torch."""


def all_gather_single(
    received: Tensor, sent: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """Gather equal tensors into one, with the function that this release of torch has."""
    return getattr(dist, ALL_GATHER)(received, sent, group=group, async_op=async_op)


@dataclass(frozen=True)
class Subgroup:
    """This rank's place among the ranks that share a matrix."""

    group: dist.ProcessGroup
    place: int
    size: int
    divided: bool = True
    """Whether products of Gram matrices are divided too."""

    def sum_(self, X: Tensor) -> Tensor:
        """Write the sum over all members into `X`, and return it."""
        whole = X.contiguous()
        dist.all_reduce(whole, group=self.group)
        return X if whole is X else X.copy_(whole)

    def max_(self, X: Tensor) -> Tensor:
        """Write the elementwise maximum over all members into a contiguous `X`, and return it."""
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
        """Write `beta * bias + alpha * A @ B` into `C`. Its rows are divided among the members."""
        if not self.divided:
            product_(C_NSS, A_NSS, B_NSS, bias=bias, beta=beta, alpha=alpha)
            return
        count, side, _ = C_NSS.shape
        each = -(-side // self.size)
        rows = slice(*part_of(side, self.place, self.size))
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
        # The block of every member is padded to the same number of rows.
        blocks = C_NSS.new_empty(self.size * count, each, side)
        all_gather_single(blocks, mine, self.group)
        together = blocks.view(self.size, count, each, side).transpose(0, 1)
        C_NSS.copy_(together.reshape(count, self.size * each, side)[:, :side])


@dataclass(frozen=True)
class SubgroupReducer:
    """Sums over whole matrices that are divided among the members: see `Reducer`."""

    subgroup: Subgroup
    axis: AxisT
    """The axis that is divided."""

    def sum_rows(self, X_NMK: Tensor) -> Tensor:
        """Return `[N, 1, K]`."""
        return self._sum("rows", X_NMK.sum(-2, keepdim=True))

    def sum_cols(self, X_NMK: Tensor) -> Tensor:
        """Return `[N, M, 1]`."""
        return self._sum("columns", X_NMK.sum(-1, keepdim=True))

    def sum_all(self, X_NMK: Tensor) -> Tensor:
        """Return `[N, 1, 1]`."""
        return self.subgroup.sum_(X_NMK.sum((-2, -1), keepdim=True))

    def _sum(self, axis: AxisT, sums: Tensor) -> Tensor:
        return self.subgroup.sum_(sums) if axis == self.axis else sums


def divided_axis(shape: tuple[int, int]) -> AxisT:
    """Return the axis of a matrix (out, in) that is divided: the longer one."""
    return "rows" if shape[0] > shape[1] else "columns"


@dataclass(frozen=True)
class SplitCost:
    """The cost of one matrix for a member of a subgroup."""

    flops: int
    elements: int
    """Elements that it sends to the others."""


def split_cost(
    shape: tuple[int, int],
    triples: Sequence[Triple],
    segments: Segments,
    size: int,
    *,
    divided: bool,
) -> SplitCost:
    """Return the cost of a matrix (out, in) for each of `size` members.

    In each segment a member computes its part of the Gram matrix and of the product with X. The
    all-reduce of the Gram matrix sends 2*(size-1)/size of it. Of each product of Gram matrices a
    member computes and sends its share, or computes all of it.
    """
    short, long = min(shape), max(shape)
    own = -(-long // size)
    squares = count_squares(triples, segments)
    rows = -(-short // size) if divided else short
    flops = len(segments) * 4 * short * short * own + squares * 2 * rows * short * short
    elements = len(segments) * 2 * short * short * (size - 1) // size
    if divided:
        elements += squares * rows * short * (size - 1)
    return SplitCost(flops, elements)


def best_split(
    shape: tuple[int, int],
    triples: Sequence[Triple],
    forms: Sequence[Segments],
    size: int,
    flops_per_element: float,
) -> tuple[float, Segments, bool]:
    """Return (cost, segments, divided) of the cheapest way to split a matrix over `size` members.

    Args:
        shape: (out, in).
        triples: coefficients of the polynomial.
        forms: segments to choose from.
        size: number of members.
        flops_per_element: FLOPs that take as long as sending one element.
    """
    candidates = []
    for segments in forms:
        for divided in (False, True):
            cost = split_cost(shape, triples, segments, size, divided=divided)
            candidates.append((cost.flops + flops_per_element * cost.elements, segments, divided))
    return min(candidates)


def part_of(length: int, place: int, size: int) -> tuple[int, int]:
    """Return the range of a side of `length` that a member works on."""
    each = -(-length // size)
    return min(place * each, length), min((place + 1) * each, length)
