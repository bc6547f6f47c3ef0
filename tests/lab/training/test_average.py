from __future__ import annotations

import pytest
import torch
from torch import nn

from muonscale.errors import ConfigError
from muonscale.lab.config.load import load_config
from muonscale.lab.training.average import WeightAverage, build_average


def snapshots(average: WeightAverage, net: nn.Linear, steps: int) -> list[torch.Tensor]:
    """Let weights change at random, and return them after each step."""
    found = []
    for step in range(1, steps + 1):
        net.weight.data += torch.randn_like(net.weight)
        average.update(step)
        found.append(net.weight.detach().clone())
    return found


def test_the_mean_is_that_of_the_weights_that_are_due() -> None:
    net = nn.Linear(3, 2)
    average = WeightAverage(net, decay=None, first=3, every=2)
    weights = snapshots(average, net, 8)
    expected = torch.stack([weights[step - 1] for step in (3, 5, 7)]).mean(0)
    torch.testing.assert_close(average.tensors["weight"], expected)
    assert average.count == 3


def test_the_moving_average_begins_with_the_weights() -> None:
    net = nn.Linear(3, 2)
    average = WeightAverage(net, decay=0.9, first=2)
    weights = snapshots(average, net, 4)
    expected = 0.81 * weights[1] + 0.09 * weights[2] + 0.1 * weights[3]
    torch.testing.assert_close(average.tensors["weight"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_come_back(dtype: torch.dtype) -> None:
    net = nn.Linear(3, 2).to(dtype)
    net.bias.requires_grad_(False)
    average = WeightAverage(net, decay=None, first=1)
    weights = snapshots(average, net, 3)
    assert average.tensors.keys() == {"weight"}
    assert average.tensors["weight"].dtype == torch.float32
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(net.weight, average.tensors["weight"].to(dtype))
        raise KeyError
    assert torch.equal(net.weight, weights[-1])


def test_an_average_that_never_begins_is_refused() -> None:
    words = ["train.average=ema", "train.average_from=1_399_000"]
    with pytest.raises(ConfigError, match=r"train\.average_from=1\.399e"):
        build_average(nn.Linear(2, 2), load_config("demo", words))
