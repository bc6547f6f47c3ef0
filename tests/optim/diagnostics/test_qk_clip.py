from __future__ import annotations

import pytest
import torch
from torch import nn

from muonscale.errors import ConfigError
from muonscale.optim.diagnostics.qk_clip import (
    Outputs,
    clip_factors,
    clip_grouped_,
    grouped_factors,
    latent_factors,
    scale_outputs_,
)
from muonscale.optim.muon import Muon


def test_gamma_brings_the_largest_logit_to_the_threshold() -> None:
    largest = torch.tensor(
        [50.0, 100.0, 200.0, 1000.0, 0.0, -3.0, -torch.inf, torch.inf, torch.nan]
    )
    expected = [1, 1, 0.5, 0.1, 1, 1, 1, 1, 1]
    assert clip_factors(largest, 100.0).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_factors_of_query_and_key_multiply_to_gamma(key_heads: int, alpha: float) -> None:
    gamma = torch.tensor([1.0, 0.5, 0.25, 0.1], dtype=torch.float64)
    query, key = grouped_factors(gamma, key_heads, alpha)
    torch.testing.assert_close(query * key.repeat_interleave(4 // key_heads), gamma)
    if key_heads == 4:
        torch.testing.assert_close(query, gamma**alpha)
    assert float(query.max()) <= 1 and float(key.max()) <= 1
    query, rotary, key = latent_factors(gamma, alpha)
    torch.testing.assert_close(query * key, gamma)
    torch.testing.assert_close(rotary, gamma)


def test_a_key_whose_other_queries_need_nothing_stays() -> None:
    query, key = grouped_factors(torch.tensor([1.0, 0.25, 0.5, 0.25]), 2, 0.5)
    assert key.tolist() == pytest.approx([1, 0.5**0.5])
    assert query.tolist() == pytest.approx([1, 0.25, 0.5**0.5, 0.25 / 0.5**0.5])


def test_options_out_of_range_are_refused() -> None:
    gamma = torch.ones(2)
    with pytest.raises(ConfigError, match="tau is 0"):
        clip_factors(gamma, 0)
    for call in (lambda: grouped_factors(gamma, 2, 1.5), lambda: latent_factors(gamma, 1.5)):
        with pytest.raises(ConfigError, match=r"alpha is 1\.5"):
            call()


def test_outputs_stacked_in_a_transposed_weight_are_scaled_where_they_are() -> None:
    weight, bias = torch.ones(3, 6), torch.ones(6)
    scale_outputs_(Outputs((weight, bias), axis=-1, first=2), torch.tensor([2.0, 3.0]))
    assert weight.tolist() == [[1, 1, 2, 3, 1, 1]] * 3
    assert bias.tolist() == [1, 1, 2, 3, 1, 1]


def narrow_linear() -> tuple[nn.Linear, nn.Linear, Muon]:
    torch.manual_seed(0)
    query, key = (nn.Linear(8, 8, bias=False).bfloat16() for _ in range(2))
    optimizer = Muon(
        [("query", query.weight), ("key", key.weight)], lr=1e-3, weight_decay=0, master="float32"
    )
    for linear in (query, key):
        linear.weight.grad = torch.randn(8, 8).bfloat16()
    optimizer.step()
    return query, key, optimizer


@pytest.mark.parametrize("gamma", [0.5, 0.9993])
def test_a_clip_of_a_16_bit_weight_is_not_undone_by_its_master(gamma: float) -> None:
    """0.9993 is below what bfloat16 can tell from 1: the float32 copy alone remembers it."""
    query, key, optimizer = narrow_linear()
    masters = {p: optimizer.state[p]["master"] for p in (query.weight, key.weight)}
    before = {p: m.clone() for p, m in masters.items()}
    gamma_H = torch.tensor([gamma, 1.0], dtype=torch.float64)
    clip_grouped_(
        Outputs((query.weight,)),
        Outputs((key.weight,)),
        gamma_H,
        key_heads=2,
        head_size=4,
        masters=masters,
    )
    for parameter, master in masters.items():
        expected = before[parameter].double()
        expected[:4] *= gamma**0.5
        torch.testing.assert_close(master, expected.float(), rtol=1e-6, atol=0)
        assert torch.equal(master[4:], before[parameter][4:])
        assert torch.equal(parameter.detach(), master.bfloat16())
    # A step of zero length: what it writes is what was clipped.
    clipped = {p: p.detach().clone() for p in masters}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for parameter, value in clipped.items():
        assert torch.equal(parameter.detach(), value)
        expected = before[parameter].double()
        expected[:4] *= gamma**0.5
        torch.testing.assert_close(
            optimizer.state[parameter]["master"], expected.float(), rtol=1e-6, atol=0
        )


def test_a_weight_that_somebody_else_has_written_counts_more_than_its_master() -> None:
    query, _, optimizer = narrow_linear()
    with torch.no_grad():
        query.weight.fill_(2.0)
    masters = {query.weight: optimizer.state[query.weight]["master"]}
    scale_outputs_(Outputs((query.weight,)), torch.full((8,), 0.5), masters)
    assert query.weight.unique().tolist() == [1.0]
    assert masters[query.weight].unique().tolist() == [1.0]
