from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from muonscale import Muon, parameter_groups
from muonscale.errors import CheckpointError

SetGradients = Callable[[nn.Module, int], None]


def trained(model: nn.Module, set_gradients: SetGradients, steps: int = 3, **options: Any) -> Muon:
    optimizer = Muon(parameter_groups(model, lr=0.1), **options)
    for seed in range(steps):
        set_gradients(model, seed)
        optimizer.step()
    return optimizer


def reversed_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    groups = parameter_groups(model, lr=lr)[::-1]
    for group in groups:
        group["params"], group["param_names"] = group["params"][::-1], group["param_names"][::-1]
    return groups


@pytest.mark.parametrize("make", [parameter_groups, reversed_groups])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(toy, set_gradients, make) -> None:
    optimizer = trained(toy, set_gradients)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(toy)
    resumed = Muon(make(twin, lr=9.0))
    resumed.load_state_dict(torch.load(file))  # with weights_only, torch's default
    for seed in range(3, 6):
        for model, each in ((toy, optimizer), (twin, resumed)):
            set_gradients(model, seed)
            each.step()
    for mine, other in zip(toy.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, resumed.state[other][key])
    assert {group["lr"] for group in resumed.param_groups} == {0.1}


def test_it_has_torchs_form(toy: nn.Module, set_gradients: SetGradients) -> None:
    state_dict = trained(toy, set_gradients).state_dict()
    assert set(state_dict) == {"state", "param_groups"}
    numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
    assert numbers == list(range(len(numbers))) == sorted(state_dict["state"])
    for group in state_dict["param_groups"]:
        assert len(group["param_names"]) == len(group["params"])
        assert group["momentum_convention"] == "ema"
        assert "matrices" not in group


def test_loading_shares_no_memory(toy: nn.Module, set_gradients: SetGradients) -> None:
    optimizer = trained(toy, set_gradients)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other = Muon(parameter_groups(copy.deepcopy(toy), lr=0.1))
    other.load_state_dict(saved)
    for state in other.state.values():
        for value in state.values():
            value.add_(1.0)
    for number, state in saved["state"].items():
        assert all(torch.equal(state[key], kept["state"][number][key]) for key in state)


@pytest.mark.filterwarnings("ignore:.*16 bits")
def test_momentum_stays_in_float32_for_bf16_parameters(toy, set_gradients: SetGradients) -> None:
    toy.bfloat16()
    optimizer = trained(toy, set_gradients)
    other = Muon(parameter_groups(toy, lr=0.1))
    other.load_state_dict(optimizer.state_dict())
    W = toy.get_parameter("up.weight")
    momentum = other.state[W]["momentum_buffer"]
    assert momentum.dtype == torch.float32
    assert torch.equal(momentum, optimizer.state[W]["momentum_buffer"])
    assert not torch.equal(momentum, momentum.bfloat16().float())


def test_a_sum_is_converted_to_an_average(toy: nn.Module, set_gradients: SetGradients) -> None:
    optimizer = trained(toy, set_gradients)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["momentum_convention"] = "sum"
    for state in saved["state"].values():
        if "momentum_buffer" in state:
            state["momentum_buffer"] /= 1 - 0.95
    other = Muon(parameter_groups(toy, lr=0.1))
    other.load_state_dict(saved)
    W = toy.get_parameter("up.weight")
    expected = optimizer.state[W]["momentum_buffer"]
    torch.testing.assert_close(other.state[W]["momentum_buffer"], expected)
    first, second = optimizer.state_dict()["param_groups"], other.state_dict()["param_groups"]
    assert first[0]["momentum_convention"] == second[0]["momentum_convention"] == "ema"


def test_differences_are_listed_by_name_and_nothing_is_written(toy, set_gradients) -> None:
    saved = copy.deepcopy(trained(toy, set_gradients).state_dict())
    group = saved["param_groups"][0]
    assert group["param_names"][0] == "first.weight"
    group["param_names"][0] = "gone.weight"
    for number, name in zip(group["params"], group["param_names"], strict=True):
        if name == "up.weight":
            saved["state"][number]["momentum_buffer"] = torch.zeros(3, 3)
    overrides = {"second.weight": {"rule": "adamw"}}
    other = Muon(parameter_groups(toy, lr=0.1, overrides=overrides))
    with pytest.raises(CheckpointError) as error:
        other.load_state_dict(saved)
    message = str(error.value)
    assert "missing: first.weight" in message
    assert "unexpected: gone.weight" in message
    assert "other shape: up.weight has momentum_buffer (3, 3), now it is (24, 8)" in message
    assert "other rule: second.weight" in message
    assert all(not v.any() for state in other.state.values() for v in state.values())


def test_a_state_without_names_is_refused(toy: nn.Module, set_gradients: SetGradients) -> None:
    optimizer = trained(toy, set_gradients)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["param_names"]
    with pytest.raises(CheckpointError, match="param_names"):
        optimizer.load_state_dict(saved)


def test_a_changed_grouping_keeps_its_options_and_warns(toy, set_gradients: SetGradients) -> None:
    optimizer = trained(toy, set_gradients)
    other = Muon(parameter_groups(toy, lr=0.7, overrides={"first.weight": {"lr": 0.3}}))
    with pytest.warns(UserWarning, match="not a group of the saved state"):
        other.load_state_dict(optimizer.state_dict())
    found = {group["name"]: group["lr"] for group in other.param_groups}
    assert found == {
        "hidden": 0.7,
        "hidden/first.weight": 0.3,
        "embedding": 0.1,
        "head": 0.1,
        "norm": 0.1,
    }
    W = toy.get_parameter("first.weight")
    assert torch.equal(other.state[W]["momentum_buffer"], optimizer.state[W]["momentum_buffer"])


def test_a_callable_scale_is_not_saved_and_not_lost(toy, set_gradients: SetGradients) -> None:
    optimizer = trained(toy, set_gradients, scale=lambda out, in_: 1.0)
    saved = optimizer.state_dict()
    assert all("scale" not in group for group in saved["param_groups"])
    optimizer.load_state_dict(saved)
    assert all(callable(group["scale"]) for group in optimizer.param_groups)


def test_hooks_around_loading_are_called(toy: nn.Module, set_gradients: SetGradients) -> None:
    optimizer = trained(toy, set_gradients)
    calls: list[str] = []
    optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after"]


def test_torchs_checkpoint_functions_round_trip(toy, set_gradients: SetGradients) -> None:
    optimizer = trained(toy, set_gradients)
    saved = copy.deepcopy(get_optimizer_state_dict(toy, optimizer))
    assert "up.weight" in saved["state"]
    other = Muon(parameter_groups(toy, lr=0.3))
    set_optimizer_state_dict(toy, other, saved)
    for parameter in toy.parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, other.state[parameter][key])
    assert {group["lr"] for group in other.param_groups} == {0.1}
