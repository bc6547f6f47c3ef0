from __future__ import annotations

import pytest
import torch
from torch import Tensor

from muonscale.optim.newton_schulz.kernels.cpu import (
    empty_squares,
    panel_product_,
    panel_rows,
    symmetric_flops,
)


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers: their products and sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).double()


@pytest.mark.parametrize("panel", [1, 3, 4, 9, 10, 100])
@pytest.mark.parametrize("count", [1, 2])
def test_panels_give_the_whole_product(panel: int, count: int) -> None:
    X = integers(count, 10, 7)
    C = torch.full((count, 10, 10), torch.nan, dtype=torch.float64)
    panel_product_(C, X, X.mT, panel=panel)
    assert torch.equal(C, X @ X.mT)


@pytest.mark.parametrize("panel", [3, 10])
@pytest.mark.parametrize("count", [1, 2])
def test_bias_and_factors_are_taken_up(panel: int, count: int) -> None:
    X = integers(count, 10, 7)
    A = X @ X.mT
    C = torch.full_like(A, torch.nan)
    panel_product_(C, A, A, panel=panel, bias=A, beta=2.0, alpha=-3.0)
    assert torch.equal(C, 2 * A - 3 * A @ A)


def test_nothing_above_the_panels_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[int] = []
    run = torch.mm

    def counted(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
        spent.append(2 * left.numel() * right.shape[-1])
        return run(left, right, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    X = integers(1, 10, 7)
    panel_product_(X.new_empty(1, 10, 10), X, X.mT, panel=4)
    # Rows 0-3 need 4 columns, rows 4-7 need 8, rows 8-9 all 10.
    assert sum(spent) == symmetric_flops(10, 7, 4) == 2 * 7 * (4 * 4 + 4 * 8 + 2 * 10)


def test_the_flops_of_one_panel_are_those_of_the_product() -> None:
    assert symmetric_flops(10, 7, 10) == symmetric_flops(10, 7, 128) == 2 * 10 * 10 * 7


def test_panels_are_for_large_sides_on_a_cpu() -> None:
    assert panel_rows(128, torch.float32, "cpu") == 128
    assert panel_rows(1024, torch.float32, "cpu") < 1024
    assert panel_rows(256, torch.float32, "cpu") < 256 == panel_rows(256, torch.bfloat16, "cpu")
    assert panel_rows(1024, torch.float32, "cuda") == 1024


def test_rows_are_set_apart_for_panels_only() -> None:
    like = torch.zeros(1)
    assert empty_squares(like, 3, 8, 8).is_contiguous()
    apart = empty_squares(like, 3, 8, 4)
    assert apart.shape == (3, 8, 8)
    assert apart.stride(1) > 8
