"""The arithmetic of routing, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from muonscale.lab.models.moe.routing import (
    affinities,
    bias_step,
    expert_loads,
    max_violation,
    router_entropy,
    routing_statistics,
    sequence_balance,
)


def test_loads_count_every_choice() -> None:
    chosen = torch.tensor([[0, 2], [2, 1], [2, 0]])
    assert expert_loads(chosen, 4).tolist() == [2, 1, 3, 0]
    assert expert_loads(chosen[:0], 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        # loads 7 3 2 4, mean 4: signs -1 +1 +1 0, whose mean is 1/4
        ("sign", [-0.1, 0.1, 0.1, 0.0]),
        ("centered", [-0.125, 0.075, 0.075, -0.025]),
    ],
)
def test_the_bias_falls_where_the_load_is_above_the_mean(update, expected: list[float]) -> None:
    loads = torch.tensor([7, 3, 2, 4], dtype=torch.float64)
    assert bias_step(loads, 0.1, update).tolist() == pytest.approx(expected, abs=1e-15)


def test_balanced_experts_keep_their_biases() -> None:
    for update in ("sign", "centered"):
        assert bias_step(torch.full((4,), 5.0), 0.1, update).tolist() == [0, 0, 0, 0]


def test_affinities_sum_to_one() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), -math.log(3.0)]])
    assert affinities(logits, "softmax")[0].tolist() == pytest.approx([3 / 13, 9 / 13, 1 / 13])
    # sigmoids 1/2, 3/4, 1/4
    assert affinities(logits, "sigmoid")[0].tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 6])


def test_entropy_is_one_for_the_uniform_and_zero_for_one_expert() -> None:
    rows = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    assert router_entropy(rows).tolist() == pytest.approx([1.0, 0.0, 0.5])


def test_max_violation_is_relative_to_the_mean() -> None:
    loads = torch.tensor([[7.0, 3, 2, 4], [4, 4, 4, 4], [16, 0, 0, 0]])
    assert max_violation(loads).tolist() == [0.75, 0.0, 3.0]


def test_statistics_of_two_layers() -> None:
    loads = torch.tensor([[7.0, 3, 2, 4], [8, 8, 0, 0]])
    assert routing_statistics(loads, torch.tensor([0.5, 0.75])) == {
        "max_violation": pytest.approx((0.75 + 1.0) / 2),
        "max_violation_worst": 1.0,
        "dead_experts": 2,
        "busiest_share": 0.5,
        "quietest_share": 0.0,
        "entropy": 0.625,
    }


def test_the_auxiliary_loss_of_two_sequences_by_hand() -> None:
    first = [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]]  # the two largest: 0 1, 0 2
    second = [[0.1, 0.2, 0.7], [0.2, 0.3, 0.5]]  # 1 2, 1 2
    gates = torch.tensor([first, second], dtype=torch.float64, requires_grad=True)
    # f = 3 / (2 * 2) * counts (2 1 1) and (0 2 2); P = means over the tokens
    by_hand = [
        0.75 * (2 * 0.55 + 0.2 + 0.25),
        0.75 * (2 * 0.25 + 2 * 0.6),
    ]
    loss = sequence_balance(gates, 2)
    assert loss.item() == pytest.approx(sum(by_hand) / 2)
    loss.backward()
    # d loss / d gate = f_i / T / B
    per_expert = [[0.75 * n / 4 for n in counts] for counts in ((2, 1, 1), (0, 2, 2))]
    expected = torch.tensor([[row, row] for row in per_expert], dtype=torch.float64)
    assert gates.grad is not None
    torch.testing.assert_close(gates.grad, expected)


def test_the_auxiliary_loss_of_uniform_affinities_is_one() -> None:
    assert sequence_balance(torch.full((3, 5, 8), 1 / 8), 2).item() == pytest.approx(1.0)
