from __future__ import annotations

import pytest
import torch
from torch import nn

from muonscale import Muon
from muonscale.errors import ConfigError
from muonscale.optim.rules.decay import decay_, decay_rate
from tests.optim.compare import close


def test_decay_is_lr_times_wd_without_the_shape_factor() -> None:
    W = nn.Parameter(torch.ones(64, 4))
    W.grad = torch.zeros(64, 4)
    bias = nn.Parameter(torch.ones(3))
    bias.grad = torch.zeros(3)
    groups = [{"params": [W]}, {"params": [bias], "rule": "adamw"}]
    Muon(groups, lr=0.5, weight_decay=0.4).step()
    close(W.detach(), torch.full((64, 4), 0.8), 1e-6)
    close(bias.detach(), torch.full((3,), 0.8), 1e-6)


def test_rates_are_lr_times_wd_or_wd_times_the_multiplier() -> None:
    group = {"lr": 0.02, "weight_decay": 0.1, "peak_lr": 0.08}
    assert decay_rate({**group, "decay": "coupled"}) == pytest.approx(0.002)
    assert decay_rate({**group, "decay": "independent"}) == pytest.approx(0.025)


def test_cautious_decay_leaves_alone_what_the_update_lengthens() -> None:
    W = [torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])]
    U = [torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0])]
    decay_(W, U, 0.25, cautious=True)
    assert W[0].tolist() == [0.75, -0.75, 1.0, -1.0, 0.75]
    assert U[0].tolist() == [1.0, -1.0, -1.0, 1.0, 0.0]
    decay_(W, U, 0.5, cautious=False)
    assert W[0].tolist() == [0.375, -0.375, 0.5, -0.5, 0.375]


@pytest.mark.parametrize("rule", ["muon", "adamw"])
def test_cautious_decay_acts_on_about_half_of_a_random_matrix(rule: str) -> None:
    torch.manual_seed(0)
    start, G = torch.randn(64, 64), torch.randn(64, 64)
    ends = []
    for decay in (0.0, 0.5):
        W = nn.Parameter(start.clone())
        W.grad = G.clone()
        group = {"params": [W], "rule": rule}
        Muon([group], lr=0.1, weight_decay=decay, cautious_decay=True).step()
        ends.append(W.detach())
    decayed = ends[0] != ends[1]
    update = start - ends[0]
    assert torch.equal(decayed, start * update >= 0)
    assert 0.4 < decayed.float().mean() < 0.6
    close(ends[1][decayed], (ends[0] - 0.05 * start)[decayed], 1e-6)


@pytest.mark.parametrize("lr", [1e-1, 1e-4])
def test_independent_decay_does_not_shrink_with_the_learning_rate(lr: float) -> None:
    W = nn.Parameter(torch.ones(4, 4))
    W.grad = torch.zeros(4, 4)
    optimizer = Muon([W], lr=lr, weight_decay=0.25, decay="independent")
    optimizer.step()
    close(W.detach(), torch.full((4, 4), 0.75), 1e-6)
    optimizer.param_groups[0]["lr"] = lr / 2
    optimizer.step()
    close(W.detach(), torch.full((4, 4), 0.75 * 0.875), 1e-6)


def test_the_peak_is_kept_through_a_checkpoint_and_can_be_given() -> None:
    W = nn.Parameter(torch.ones(2, 2))
    options = {"weight_decay": 0.1, "decay": "independent"}
    optimizer = Muon([("w", W)], lr=0.4, **options)
    optimizer.param_groups[0]["lr"] = 0.1
    resumed = Muon([("w", W)], lr=0.1, **options)
    resumed.load_state_dict(optimizer.state_dict())
    assert decay_rate(resumed.param_groups[0]) == pytest.approx(0.025)
    given = Muon([{"params": [W], "peak_lr": 0.2}], lr=0.1, **options)
    assert decay_rate(given.param_groups[0]) == pytest.approx(0.05)


def test_independent_decay_of_a_group_without_a_learning_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="peak_lr"):
        Muon([nn.Parameter(torch.ones(2, 2))], lr=0.0, decay="independent")
