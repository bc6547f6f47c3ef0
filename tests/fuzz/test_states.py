"""States of an optimizer that are nearly right: what is loaded can be stepped from, or is refused."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonscale import Muon
from tests.fuzz.outcome import refused_or
from tests.fuzz.strategies import ODD_NUMBERS, VALUES, damaged
from tests.fuzz.tiers import tiers


def make() -> tuple[nn.Module, Muon]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    return model, Muon(model, lr=0.01, post_norm="normuon")


def step(model: nn.Module, optimizer: Muon) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@st.composite
def poisoned(draw: st.DrawFn, state: dict[str, Any]) -> dict[str, Any]:
    """Draw a copy with one element of one tensor replaced by an odd number that a float can be."""
    state = copy.deepcopy(state)
    tensors = draw(st.sampled_from(list(state["state"].values())))
    tensor = tensors[draw(st.sampled_from(sorted(tensors)))]
    number = draw(ODD_NUMBERS)
    # A finite moment may be so large that the step overflows: that is no fault of the state.
    if not 1e15 <= abs(number) < math.inf:
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = float(number)
    return state


@tiers(few=60, many=2000)
def test_states_are_loaded_or_refused(tried: settings) -> None:
    trained, source = make()
    step(trained, source)
    good = source.state_dict()
    tensors = st.sampled_from(
        [torch.ones(4, 4), torch.ones(()), torch.zeros(0), torch.ones(4, 4, dtype=torch.complex64),
         torch.ones(9, 4).to(torch.float8_e4m3fn), torch.full((4,), -1.0), torch.tensor(True)]
    )  # fmt: skip
    both = st.one_of(VALUES, tensors)
    broken = st.one_of(poisoned(good), poisoned(good), damaged(good, both), both)

    @tried
    @given(broken, st.booleans())
    def check(state: Any, strict: bool) -> None:
        warnings.simplefilter("ignore")  # of groups that the state does not have
        model, optimizer = make()
        before = values(model)
        untouched = repr(optimizer.state_dict())
        if refused_or(lambda: optimizer.load_state_dict(state, strict=strict)):
            assert repr(optimizer.state_dict()) == untouched
        refused = refused_or(lambda: step(model, optimizer))
        after = values(model)
        if refused:
            assert all(map(torch.equal, before, after))
        groups = optimizer.param_groups
        usual = all(group["lr"] < 10 and group["eps"] > 1e-12 for group in groups)
        if usual:  # huge rates are rates
            assert all(bool(value.isfinite().all()) for value in after)

    with warnings.catch_warnings():
        check()


@tiers(few=60, many=2000)
def test_options_of_groups_are_taken_or_refused(tried: settings) -> None:
    keys = ["lr", "peak_lr", "weight_decay", "momentum", "betas", "eps", "decay", "params", "rule"]

    @tried
    @given(st.integers(0, 2), st.sampled_from(keys), VALUES)
    def check(number: int, key: str, value: Any) -> None:
        model, optimizer = make()
        before = values(model)
        optimizer.param_groups[number][key] = value
        refused = refused_or(lambda: step(model, optimizer))
        after = values(model)
        if refused:
            assert all(map(torch.equal, before, after))
        if key != "lr" and key != "eps":  # huge rates are rates
            assert all(bool(value.isfinite().all()) for value in after)

    check()
