from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz import orthogonalize as module
from muonscale.optim.newton_schulz.coefficients import SCHEDULES, resolve
from muonscale.optim.newton_schulz.flops import (
    choose_segments,
    gram_segments,
    highest_value,
    ns_flops,
)
from muonscale.optim.newton_schulz.orthogonalize import orthogonalize

JORDAN = resolve("jordan", 5)


def test_the_direct_form_counts_three_products_per_step() -> None:
    # X X^T and B X: 2*S*S*L each; A A: 2*S*S*S
    assert ns_flops((8, 24), 5, "direct") == 5 * (4 * 64 * 24 + 2 * 512)
    assert ns_flops((24, 8), 5, "direct") == ns_flops((8, 24), 5, "direct")
    assert ns_flops((2, 3, 8, 24), 1) == 6 * ns_flops((8, 24), 1)


def test_the_gram_form_counts_its_segments() -> None:
    # Two segments of 3 and 2 steps: 4*S*S*L and (4*k - 3) products each.
    assert ns_flops((8, 240), 5, "gram") == 2 * 4 * 64 * 240 + (9 + 5) * 2 * 512
    assert ns_flops((8, 240), 5, "gram", dtype=torch.float64) == 4 * 64 * 240 + 17 * 2 * 512


def test_a_cubic_saves_a_product_per_step() -> None:
    quintic = ns_flops((8, 8), 5, "direct")
    assert ns_flops((8, 8), 5, "direct", coefficients="cubic5") == quintic - 5 * 2 * 512


def test_panels_lower_the_count_on_a_cpu() -> None:
    whole = ns_flops((1024, 1024), 5, "direct", device="cuda")
    assert whole == 5 * 6 * 1024**3
    # Eight panels: 36 of 64 blocks in two products of three.
    assert ns_flops((1024, 1024), 5, "direct") == 5 * (2 + 4 * 36 / 64) * 1024**3


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("coefficients", ["jordan", "cubic5"])
@pytest.mark.parametrize("shape", [(2, 40, 24), (2, 24, 24), (300, 280)])
def test_the_count_is_what_is_executed(
    form: str, coefficients: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[int] = []

    def count(name: str) -> None:
        run = getattr(torch, name)

        def counted(*tensors: Tensor, **rest: Any) -> Tensor:
            left, right = tensors[-2:]
            spent.append(2 * left.numel() * right.shape[-1])
            return run(*tensors, **rest)

        monkeypatch.setattr(torch, name, counted)

    for name in ("mm", "addmm", "bmm", "baddbmm"):
        count(name)
    orthogonalize(torch.randn(shape), coefficients, 5, form, torch.float32)
    assert sum(spent) == ns_flops(shape, 5, form, coefficients=coefficients)


@pytest.mark.parametrize("shape", [(64, 64), (64, 80), (128, 352), (512, 1376), (64, 1408)])
def test_auto_is_the_cheaper_form(shape: tuple[int, int]) -> None:
    costs = {form: ns_flops(shape, 5, form) for form in ("direct", "gram")}
    assert ns_flops(shape, 5, "auto") == ns_flops(shape, 5) == min(costs.values())


def test_auto_is_direct_on_squares_and_gram_on_long_matrices() -> None:
    assert choose_segments((512, 512), JORDAN) == (1, 1, 1, 1, 1)
    assert choose_segments((512, 1376), JORDAN) == choose_segments((1376, 512), JORDAN) == (3, 2)


def test_auto_in_16_bits_leaves_steps_that_overshoot_to_the_direct_form() -> None:
    for name, safe in [("jordan", True), ("you5", True), ("polar_express", False), ("cans", False)]:
        found = choose_segments((64, 1408), resolve(name, 5), dtype=torch.bfloat16)
        assert (len(found) < 5) is safe, name
    assert highest_value(JORDAN.triples) == pytest.approx(1.2024, abs=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_segment_is_steeper_than_rounding_allows(name: str) -> None:
    coefficients = resolve(name, 12)
    for dtype, steepest in ((torch.float32, 50), (torch.bfloat16, 50), (torch.float64, 2000)):
        step = 0
        for length in gram_segments(coefficients, dtype, 128):
            slopes = [a for a, _, _ in coefficients.triples[step : step + length]]
            assert torch.tensor(slopes).prod() <= steepest
            step += length
        assert step == 12


def test_small_matrices_restart_more_often_in_16_bits() -> None:
    found = {n: gram_segments(JORDAN, torch.bfloat16, n) for n in (1, 8, 16, 32, 128)}
    assert found == {1: (2, 2, 1), 8: (2, 2, 1), 16: (2, 2, 1), 32: (2, 2, 1), 128: (3, 2)}
    assert gram_segments(JORDAN, torch.float16, 32) == (3, 2)


@pytest.mark.parametrize("shape", [(8, 22), (16, 44), (22, 8), (64, 176)])
def test_ill_conditioned_matrices_stay_short_in_bfloat16(shape: tuple[int, int]) -> None:
    # Singular values over up to eight decades: what a gradient of a small model has.
    generator = torch.Generator().manual_seed(0)
    out, in_ = shape
    short = min(shape)
    matrices = []
    for decades in torch.linspace(0, 8, 200):
        values = 10 ** (-torch.linspace(0, float(decades), short))
        U = torch.linalg.qr(torch.randn(out, out, generator=generator)).Q[:, :short]
        V = torch.linalg.qr(torch.randn(in_, in_, generator=generator)).Q[:, :short]
        matrices.append((U * values) @ V.T)
    for form in ("gram", "auto"):
        O_NMK = orthogonalize(torch.stack(matrices), form=form, dtype="bfloat16")
        assert float(torch.linalg.matrix_norm(O_NMK.double(), 2).max()) < 1.25


def test_restarts_can_be_placed() -> None:
    assert gram_segments(JORDAN, torch.float32, 64) == (3, 2)
    assert gram_segments(replace(JORDAN, restarts=()), torch.float32, 64) == (5,)
    assert gram_segments(replace(JORDAN, restarts=(2,)), torch.float32, 64) == (2, 3)
    assert gram_segments(replace(JORDAN, restarts=(4, 1)), torch.float32, 64) == (1, 3, 1)
    for wrong in ((5,), (2, 7)):
        with pytest.raises(ConfigError, match=f"restarts.*{wrong[-1]}.*5 steps"):
            gram_segments(replace(JORDAN, restarts=wrong), torch.float32, 64)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="gram"):
        ns_flops((8, 8), 5, "gramm")
    with pytest.raises(ConfigError, match="gram"):
        module.orthogonalize(torch.zeros(2, 2), form="gramm")
