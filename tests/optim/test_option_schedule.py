from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from muonscale.errors import ConfigError
from muonscale.optim.muon import Muon
from muonscale.optim.option_schedule import OptionSchedule


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 7))


def group(optimizer: Muon, name: str) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if group["name"] == name)


def train(net: nn.Module, optimizer: Muon, after: Callable[[int], object], steps: range) -> None:
    for step in steps:
        loss = net(torch.arange(7)).square().sum() * (1 + step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(step)


def test_values_and_multiples_reach_the_groups_that_have_the_option() -> None:
    optimizer = Muon(model(), lr=0.02, weight_decay=0.1)
    own = {g["name"]: g["weight_decay"] for g in optimizer.param_groups}
    schedule = OptionSchedule(
        optimizer,
        values={"momentum": lambda step: 0.8 + 0.01 * step},
        multipliers={"weight_decay": lambda step: 1 - step / 4},
    )
    for step in range(4):
        assert group(optimizer, "hidden")["momentum"] == pytest.approx(0.8 + 0.01 * step)
        for each in optimizer.param_groups:
            assert each["weight_decay"] == pytest.approx(own[each["name"]] * (1 - step / 4))
        assert schedule.current()["hidden.momentum"] == pytest.approx(0.8 + 0.01 * step)
        schedule.step()
    assert not any(key.endswith("momentum") for key in schedule.current() if "hidden" not in key)


def test_one_group_is_scheduled_by_its_name() -> None:
    optimizer = Muon(model(), lr=0.02, weight_decay=0.1)
    before = group(optimizer, "hidden")["weight_decay"]
    schedule = OptionSchedule(optimizer, values={"embedding.weight_decay": lambda step: 0.01})
    schedule.step()
    assert group(optimizer, "embedding")["weight_decay"] == 0.01
    assert group(optimizer, "hidden")["weight_decay"] == before


def test_a_group_without_a_name_is_scheduled_by_its_number() -> None:
    groups = [{"params": [torch.ones(4, 6)], "rule": "muon", "weight_decay": d} for d in (0.1, 0.2)]
    schedule = OptionSchedule(Muon(groups, lr=0.02), multipliers={"weight_decay": lambda step: 0.5})
    assert schedule.current() == {"0.weight_decay": 0.05, "1.weight_decay": 0.1}
    optimizer = Muon(groups, lr=0.02)
    OptionSchedule(optimizer, values={"1.momentum": lambda step: 0.5})
    assert [g["momentum"] for g in optimizer.param_groups] == [0.95, 0.5]


def test_a_scheduled_step_is_that_of_an_optimizer_with_these_options() -> None:
    """The optimizer uses the value of the step, not that with which it was made."""
    one, two = model(), model()
    scheduled, plain = Muon(one, lr=0.02, momentum=0.5), Muon(two, lr=0.02, momentum=0.5)
    schedule = OptionSchedule(scheduled, values={"momentum": lambda step: 0.5 + 0.1 * step})

    def by_hand(step: int) -> None:
        group(plain, "hidden")["momentum"] = 0.5 + 0.1 * (step + 1)

    train(one, scheduled, lambda step: schedule.step(), range(4))
    train(two, plain, by_hand, range(4))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_saved_schedule_goes_on_where_it_was() -> None:
    def make(net: nn.Module) -> tuple[Muon, OptionSchedule, LambdaLR]:
        optimizer = Muon(net, lr=0.02, weight_decay=0.1)
        schedule = OptionSchedule(
            optimizer,
            values={"momentum": lambda step: 0.9 - 0.01 * step},
            multipliers={"weight_decay": lambda step: 1 + step},
        )
        return optimizer, schedule, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    whole, parts = model(), model()
    optimizer, schedule, rates = make(whole)

    def both(_: int) -> None:
        schedule.step()
        rates.step()

    train(whole, optimizer, both, range(5))
    optimizer, schedule, rates = make(parts)
    train(parts, optimizer, both, range(3))
    saved = [part.state_dict() for part in (parts, optimizer, schedule, rates)]
    again = model()
    optimizer, schedule, rates = make(again)
    for part, state in zip((again, optimizer, schedule, rates), saved, strict=True):
        part.load_state_dict(state)
    train(again, optimizer, both, range(3, 5))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"values": {"momentm": lambda step: 1}}, "did you mean momentum"),
        ({"values": {"lr": lambda step: 1}}, "lr: learning rates"),
        ({"values": {"nesterov": lambda step: 1}}, "'nesterov' is no option"),
        ({"values": {"hiden.momentum": lambda step: 0.9}}, "did you mean hidden"),
        ({"values": {"embedding.momentum": lambda step: 0.9}}, "no group on a rule that has it"),
        ({"values": {"momentum": lambda step: 1.5}}, "momentum is 1.5"),
        (
            {
                "values": {"momentum": lambda step: 0.9},
                "multipliers": {"hidden.momentum": lambda step: 1},
            },
            "hidden.momentum is scheduled twice",
        ),
    ],
)
def test_wrong_schedules_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        OptionSchedule(Muon(model(), lr=0.02), **given)


def test_another_schedule_is_not_loaded() -> None:
    optimizer = Muon(model(), lr=0.02)
    first = OptionSchedule(optimizer, values={"momentum": lambda step: 0.9})
    second = OptionSchedule(optimizer, values={"rms": lambda step: 0.2})
    with pytest.raises(ConfigError, match="schedule the same options"):
        second.load_state_dict(first.state_dict())
