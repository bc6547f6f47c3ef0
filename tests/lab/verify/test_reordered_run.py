"""Sums in parts are the same sums, rounded otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from muonscale.lab.verify.reordered_run import REORDERINGS, SplitSums

PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mm": lambda added, left, right: left[0] @ right[0],
    "bmm": lambda added, left, right: left @ right,
    "addmm": lambda added, left, right: torch.addmm(added[0], left[0], right[0]),
    "addmm of a bias": lambda added, left, right: torch.addmm(added[0, 0], left[0], right[0]),
    "addmm with factors": lambda added, left, right: torch.addmm(
        added[0], left[0], right[0], beta=2.0, alpha=3.0
    ),
    "baddbmm": torch.baddbmm,
}


def operands(inner: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 30, 20), (2, 30, inner), (2, inner, 20))
    added, left, right = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return added, left, right


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("inner", [1, 2, 7, 64])
def test_sums_in_parts_are_the_same_sums(product: Callable[..., Tensor], inner: int) -> None:
    given = operands(inner, torch.float64)
    for reordering in REORDERINGS:
        with SplitSums(reordering.divisor):
            found = product(*given)
        torch.testing.assert_close(found, product(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm"])
def test_reordered_runs_round_otherwise_than_one_process_and_than_each_other(name: str) -> None:
    given, product = operands(64), PRODUCTS[name]
    found = [product(*given)]
    for reordering in REORDERINGS:
        with SplitSums(reordering.divisor):
            found.append(product(*given))
    assert len({tuple(each.flatten().tolist()) for each in found}) == 1 + len(REORDERINGS)


def test_the_backward_pass_is_summed_in_parts_too() -> None:
    def gradient(*, parts: bool) -> Tensor:
        _, left, right = operands(64)
        left.requires_grad_()
        product = left[0] @ right[0]
        if parts:
            with SplitSums(2):
                product.square().sum().backward()
        else:
            product.square().sum().backward()
        assert left.grad is not None
        return left.grad

    assert not torch.equal(gradient(parts=True), gradient(parts=False))


def test_reordered_runs_read_the_same_sequences_in_other_orders() -> None:
    batch = torch.arange(12).reshape(4, 3).numpy()
    orders = [tuple(reordering.order(batch)[:, 0].tolist()) for reordering in REORDERINGS]
    assert all(sorted(order) == [0, 3, 6, 9] for order in orders)
    assert len({(0, 3, 6, 9), *orders}) == 1 + len(REORDERINGS)
