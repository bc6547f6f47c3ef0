from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from muonscale import Muon, parameter_groups
from muonscale.errors import CheckpointError
from muonscale.optim.newton_schulz.coefficients import Coefficients
from tests.optim.compare import SetGradients, equal, snapshot, states


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


def test_coefficients_of_ones_own_are_saved_and_loaded(toy, set_gradients) -> None:
    own = Coefficients(triples=((2.0, -1.5, 0.5), (1.5, -0.5, 0.0)), margin=1.01)
    file = io.BytesIO()
    torch.save(trained(toy, set_gradients, ns_coefficients=own, ns_steps=2).state_dict(), file)
    file.seek(0)
    resumed = trained(copy.deepcopy(toy), set_gradients)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert {group["ns_coefficients"] for group in resumed.param_groups} == {own}


def test_it_has_torchs_form(toy: nn.Module, set_gradients: SetGradients) -> None:
    state_dict = trained(toy, set_gradients).state_dict()
    assert set(state_dict) == {"state", "param_groups"}
    numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
    assert numbers == list(range(len(numbers))) == sorted(state_dict["state"])
    for group in state_dict["param_groups"]:
        assert len(group["param_names"]) == len(group["params"])
        assert group["momentum_convention"] == "ema"
        assert group["matrices"] is None


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
    assert "up.weight: momentum_buffer was saved as (3, 3), but is (24, 8)" in message
    assert "second.weight: saved with ['momentum_buffer']" in message
    assert all(not v.any() for state in other.state.values() for v in state.values())


@pytest.mark.filterwarnings("ignore:.*param_names")
def test_without_names_its_own_groups_are_taken_by_place(toy, set_gradients) -> None:
    """torchtitan unflattens a state dict by name and drops the names."""
    trained_one = trained(toy, set_gradients)
    saved = copy.deepcopy(trained_one.state_dict())
    for group in saved["param_groups"]:
        del group["param_names"]
    fresh = Muon(parameter_groups(toy, lr=0.1))
    fresh.load_state_dict(saved)
    assert equal(states(fresh), states(trained_one))


@pytest.mark.filterwarnings("ignore:.*param_names")
def test_names_that_are_there_count_where_another_group_has_none(toy, set_gradients) -> None:
    trained_one = trained(toy, set_gradients)
    saved = copy.deepcopy(trained_one.state_dict())
    hidden, *others = saved["param_groups"]
    del others[0]["param_names"]
    hidden["params"].reverse()
    hidden["param_names"].reverse()
    fresh = Muon(parameter_groups(toy, lr=0.1))
    fresh.load_state_dict(saved)
    assert equal(states(fresh), states(trained_one))


@pytest.mark.parametrize("change", ["order", "foreign"])
def test_without_names_other_groups_are_refused(toy, set_gradients, change: str) -> None:
    saved = trained(toy, set_gradients).state_dict()
    for group in saved["param_groups"]:
        del group["param_names"]
        if change == "foreign":
            del group["rule"]
    if change == "order":
        saved["param_groups"].reverse()
    with pytest.raises(CheckpointError, match="no param_names"):
        Muon(parameter_groups(toy, lr=0.1)).load_state_dict(saved)


def test_a_changed_grouping_keeps_its_options_and_warns(toy, set_gradients: SetGradients) -> None:
    optimizer = trained(toy, set_gradients)
    other = Muon(parameter_groups(toy, lr=0.7, overrides={"first.weight": {"lr": 0.3}}))
    with pytest.warns(UserWarning, match=r"'hidden(/first\.weight)?'"):
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
    assert all(group["scale"] is None for group in saved["param_groups"])
    optimizer.load_state_dict(saved)
    assert all(callable(group["scale"]) for group in optimizer.param_groups)


def test_hooks_around_loading_are_called(toy: nn.Module, set_gradients: SetGradients) -> None:
    optimizer = trained(toy, set_gradients)
    calls: list[str] = []
    optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after"]


VARIANTS = [
    {},
    {"post_norm": "normuon", "decay": "independent"},
    {"post_norm": "col_row", "scale": "rms_exact", "cautious_decay": True},
    {"master": "float32", "post_norm": "normuon"},
    {"second_moment": "update"},
    {"second_moment": "gradient", "post_norm": "normuon", "constraint": "weight_norm"},
    {"constraint": "row_magnitude", "cautious_decay": True},
    {"block_period": 2},
    {"row_fraction": 0.5, "post_norm": "normuon"},
    {"master": "stochastic"},
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.filterwarnings("ignore:.*16 bits")
def test_torchs_checkpoint_functions_round_trip_every_state(
    toy, set_gradients: SetGradients, tmp_path, options: dict[str, Any], flatten: bool
) -> None:
    if "master" in options:
        toy.bfloat16()
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    optimizer = trained(toy, set_gradients, **options)
    saved = get_optimizer_state_dict(toy, optimizer, options=how)
    assert ("state.up.weight.momentum_buffer" if flatten else "state") in saved
    checkpoint.save({"optimizer": saved}, checkpoint_id=tmp_path)
    twin = copy.deepcopy(toy)
    other = Muon(parameter_groups(twin, lr=0.3), **options)
    found = {"optimizer": get_optimizer_state_dict(twin, other, options=how)}
    checkpoint.load(found, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, other, found["optimizer"], options=how)
    assert equal(states(optimizer), states(other))
    for mine, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        left_out = ("params", "matrices", "why")
        kept = [{k: v for k, v in g.items() if k not in left_out} for g in (mine, theirs)]
        assert kept[0] == kept[1]
    for seed in range(3, 5):
        for model, each in ((toy, optimizer), (twin, other)):
            set_gradients(model, seed)
            each.step()
    assert equal(snapshot(toy), snapshot(twin))


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*16 bits")
def test_every_variant_resumes_bit_for_bit_from_a_file(toy, set_gradients, options) -> None:
    if "master" in options:
        toy.bfloat16()
    optimizer = trained(toy, set_gradients, **options)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    twin = copy.deepcopy(toy)
    resumed = Muon(parameter_groups(twin, lr=9.0), **options)
    resumed.load_state_dict(torch.load(file, weights_only=True)["optimizer"])
    for seed in range(3, 5):
        for model, each in ((toy, optimizer), (twin, resumed)):
            set_gradients(model, seed)
            each.step()
    assert equal(snapshot(toy), snapshot(twin))
    assert equal(states(optimizer), states(resumed))


def test_state_without_the_rows_of_normuon_does_not_fit(toy, set_gradients: SetGradients) -> None:
    saved = trained(toy, set_gradients).state_dict()
    other = Muon(parameter_groups(toy, lr=0.1), post_norm="normuon")
    with pytest.raises(CheckpointError, match="row_second_moment"):
        other.load_state_dict(saved)
