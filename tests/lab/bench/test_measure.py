from __future__ import annotations

import pytest
import torch

from muonscale.lab.bench.measure import executed_flops, peak_extra_bytes, state_bytes
from muonscale.lab.bench.rates import addmm_rate, direct_flops, weighted_rate


def test_memory_counts_what_is_alive_at_once() -> None:
    def work() -> None:
        kept = torch.empty(1000, 256)
        for _ in range(3):
            torch.empty(2000, 256)
        del kept
        torch.empty(500, 256)

    assert peak_extra_bytes(work) == 3000 * 256 * 4


def test_state_is_counted_once_however_nested() -> None:
    buffer = torch.zeros(6)
    state = {"p": {0: {"momentum": buffer, "view": buffer[:2], "step": 3}}, "q": [torch.zeros(2)]}
    assert state_bytes(state) == 32


def test_operations_are_those_of_the_products() -> None:
    X, B = torch.randn(8, 24), torch.randn(8, 8)
    assert executed_flops(lambda: B @ X) == 2 * 8 * 8 * 24
    gram, square, product = 2 * 8 * 8 * 24, 2 * 8**3, 2 * 8 * 8 * 24
    assert direct_flops(24, 8) == direct_flops(8, 24) == 5 * (gram + square + product)


def test_a_rate_over_shapes_is_weighted_by_their_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from muonscale.lab.bench import rates

    monkeypatch.setattr(rates, "addmm_rate", lambda out, in_, *_: 100.0 if out == 8 else 400.0)
    small, large = 3 * direct_flops(8, 8), 2 * direct_flops(16, 16)
    wanted = (small + large) / (small / 100 + large / 400)
    found = weighted_rate([(1, 8, 8), (2, 8, 8), (2, 16, 16)], torch.float32)
    assert found == pytest.approx(wanted)


def test_a_rate_is_finite_and_above_zero() -> None:
    assert 0 < addmm_rate(16, 32, torch.float32) < 1e16
