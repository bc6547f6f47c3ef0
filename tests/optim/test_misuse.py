"""Options, parameters and states that cannot be used: refused with a sentence, nothing written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonscale import Muon, convert_state_dict
from muonscale.errors import CheckpointError, ConfigError, GroupingError, MuonscaleError
from tests.optim.compare import SetGradients, equal, snapshot


@pytest.fixture
def optimizer(toy: nn.Module, set_gradients: SetGradients) -> Muon:
    made = Muon(toy, lr=0.01, weight_decay=0.1)
    set_gradients(toy, 0)
    made.step()
    set_gradients(toy, 1)
    return made


NAN = float("nan")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", NAN), ("lr", float("inf")), ("lr", -0.1), ("lr", "0.1"), ("lr", None), ("lr", True),
        ("lr", torch.tensor(NAN)), ("lr", torch.ones(2)), ("lr", 10**400), ("momentum", NAN),
        ("momentum", 1.5), ("weight_decay", NAN), ("weight_decay", -1.0), ("betas", (0.9,)),
        ("betas", (NAN, 0.9)), ("eps", 0.0), ("ns_steps", 2.5), ("nesterov", "no"),
        ("decay", "none"), ("peak_lr", None), ("peak_lr", NAN), ("rule", "sgd"),
    ],
)  # fmt: skip
def test_a_changed_option_outside_its_range_stops_the_step(
    key: str, value: object, toy: nn.Module, optimizer: Muon
) -> None:
    before = snapshot(toy)
    for group in optimizer.param_groups:
        group[key] = value
    with pytest.raises(ConfigError, match=key):
        optimizer.step()
    assert equal(before, snapshot(toy))


def test_an_option_that_is_gone_stops_the_step(toy: nn.Module, optimizer: Muon) -> None:
    before = snapshot(toy)
    del optimizer.param_groups[-1]["lr"]
    with pytest.raises(ConfigError, match="lr is missing"):
        optimizer.step()
    assert equal(before, snapshot(toy))


def test_a_schedule_that_falls_below_zero_stops_the_step(toy: nn.Module, optimizer: Muon) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step)
    optimizer.step()  # step 0
    schedule.step()
    optimizer.step()  # a learning rate of 0
    schedule.step()
    with pytest.raises(ConfigError, match="scheduler"):
        optimizer.step()


def made_in_inference_mode() -> nn.Parameter:
    with torch.inference_mode():
        return nn.Parameter(torch.ones(4, 4))


PARAMETERS: dict[str, Callable[[], nn.Parameter]] = {
    "float8": lambda: nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn)),
    "complex": lambda: nn.Parameter(torch.ones(4, 4, dtype=torch.complex64)),
    "expanded": lambda: nn.Parameter(torch.ones(1, 4).expand(4, 4)),
    "overlapping": lambda: nn.Parameter(torch.ones(10).as_strided((4, 4), (2, 1))),
    "inference": made_in_inference_mode,
}


@pytest.mark.parametrize("make", PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_that_cannot_be_updated(
    make: Callable[[], nn.Parameter], toy: nn.Module
) -> None:
    toy.up.weight = make()
    with pytest.raises(GroupingError, match=r"up\.weight"):
        Muon(toy)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(6, 4).t(),
        lambda: torch.ones(8, 8)[::2, ::2],
        lambda: torch.ones(4, 1),
        lambda: torch.ones(1, 4).expand(1, 4),
        lambda: torch.ones(0, 4).expand(0, 4),
        lambda: torch.ones(10).as_strided((2, 5), (5, 1)),
    ],
)
def test_parameters_of_unusual_strides_are_updated(make: Callable[[], Tensor]) -> None:
    parameter = nn.Parameter(make())
    parameter.grad = torch.ones(parameter.shape)
    before = parameter.detach().clone()
    Muon([parameter], lr=0.1).step()
    assert (parameter != before).all()


def test_a_step_on_the_meta_device_is_refused(toy: nn.Module) -> None:
    optimizer = Muon(toy.to("meta"))
    for parameter in toy.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(GroupingError, match="meta"):
        optimizer.step()


def test_made_or_stepped_in_inference_mode(toy: nn.Module, set_gradients: SetGradients) -> None:
    twin = copy.deepcopy(toy)
    usual = Muon(twin, lr=0.1)
    with torch.inference_mode():
        optimizer = Muon(toy, lr=0.1)
    for seed in range(3):
        set_gradients(toy, seed)
        set_gradients(twin, seed)
        with torch.inference_mode(seed == 1):
            optimizer.step()
        usual.step()
    assert equal(snapshot(toy), snapshot(twin))


def test_under_another_default_device(toy: nn.Module, set_gradients: SetGradients) -> None:
    """What is not made on the device of a parameter is made on the CPU."""
    twin = copy.deepcopy(toy)
    for model, device in ((toy, "cpu"), (twin, "meta")):
        set_gradients(model, 0)
        with torch.device(device):
            optimizer = Muon(model, lr=0.1)
            optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
            assert optimizer.stats()["update_rms"] > 0
    assert equal(snapshot(toy), snapshot(twin))


Damage = Callable[[dict[str, Any]], Any]
STATES: dict[str, Damage] = {
    "a list": lambda state: [state],
    "nothing": lambda state: None,
    "empty": lambda state: {},
    "without groups": lambda state: {"state": state["state"]},
    "without state": lambda state: {"param_groups": state["param_groups"]},
    "state of another kind": lambda state: {**state, "state": 5},
    "values of another kind": lambda state: {**state, "state": {0: [1.0]}},
    "groups of another kind": lambda state: {**state, "param_groups": {}},
    "a group without parameters": lambda state: {**state, "param_groups": [{}]},
    "too few names": lambda state: {**state, "param_groups": [{"params": [0], "param_names": []}]},
    "no values": lambda state: {
        **state,
        "state": {n: {k: v.to("meta") for k, v in s.items()} for n, s in state["state"].items()},
    },
}


@pytest.mark.parametrize("damage", STATES.values(), ids=STATES)
def test_what_is_no_state_of_an_optimizer(damage: Damage, optimizer: Muon) -> None:
    given = damage(optimizer.state_dict())
    for load in (
        lambda: optimizer.load_state_dict(given),
        lambda: optimizer.load_state_dict(given, strict=False),
        lambda: convert_state_dict(given, [], "torch"),
    ):
        with pytest.raises(CheckpointError, match="the optimizer state"):
            load()


def test_a_refused_option_of_the_constructor_is_one_of_our_errors(toy: nn.Module) -> None:
    for options in ({"lr": 10**400}, {"nesterov": "no"}, {"cautious_decay": None}):
        with pytest.raises(MuonscaleError, match=next(iter(options))):
            Muon(toy, **options)


def _change(key: str, value: object) -> Damage:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        first = next(n for n, values in state["state"].items() if key in values)
        old = state["state"][first][key]
        new = value
        if isinstance(value, float):
            new = old.clone()
            new.view(-1)[-1] = value
        return {**state, "state": {**state["state"], first: {**state["state"][first], key: new}}}

    return change


def _change_group(**options: object) -> Damage:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        *others, last = state["param_groups"]
        return {**state, "param_groups": [*others, {**last, **options}]}

    return change


POISON: dict[str, tuple[str, Damage]] = {
    "nan": ("momentum_buffer of first", _change("momentum_buffer", NAN)),
    "infinity": ("exp_avg of", _change("exp_avg", float("inf"))),
    "negative infinity": ("exp_avg of", _change("exp_avg", float("-inf"))),
    "negative square": ("exp_avg_sq of", _change("exp_avg_sq", -1e-9)),
    "negative step": ("step of", _change("step", -1.0)),
    "step of nan": ("step of", _change("step", NAN)),
    "nan in place of a tensor": ("step of", _change("step", torch.tensor(NAN))),
    "text": ("a str", _change("exp_avg", "zeros")),
    "none": ("a NoneType", _change("step", None)),
    "complex": ("a Tensor", _change("exp_avg", torch.ones(4, dtype=torch.complex64))),
    "names of another kind": ("one name for each", _change_group(param_names=None)),
    "numbers of another kind": ("list of params", _change_group(params=[[0]])),
    "lr of nan": ("lr", _change_group(lr=NAN)),
    "negative decay": ("weight_decay", _change_group(weight_decay=-1.0)),
    "unknown rule": ("rule", _change_group(rule="sgd")),
    "unknown post_norm": ("post_norm", _change_group(post_norm="no")),
    "sum without momentum": ("momentum", _change_group(momentum_convention="sum", momentum=None)),
}


@pytest.mark.parametrize(("what", "damage"), POISON.values(), ids=POISON)
def test_a_state_that_would_spoil_the_weights(
    what: str, damage: Damage, toy: nn.Module, optimizer: Muon
) -> None:
    before = copy.deepcopy(optimizer.state_dict())
    given = damage(copy.deepcopy(before))
    for strict in (True, False):
        with pytest.raises(MuonscaleError, match=what):
            optimizer.load_state_dict(given, strict=strict)
    after = optimizer.state_dict()
    assert repr(after["param_groups"]) == repr(before["param_groups"])
    assert repr(after["state"]) == repr(before["state"])


def test_a_group_without_parameters_is_refused(toy: nn.Module, optimizer: Muon) -> None:
    for group in (
        {"params": None, "rule": "muon"},
        {"params": 5, "rule": "muon"},
        {"rule": "muon"},
    ):
        with pytest.raises(GroupingError, match="params of a group"):
            Muon([group])
        with pytest.raises(GroupingError, match="params of a group"):
            optimizer.add_param_group(group)
    for key in ("param_names", "params"):
        optimizer.param_groups[-1][key] = None
        with pytest.raises(GroupingError, match=key):
            optimizer.step()
