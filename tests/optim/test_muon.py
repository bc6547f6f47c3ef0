"""The optimizer as an object: what it is made of, takes and refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from muonscale import Muon, parameter_groups
from muonscale.errors import ConfigError, GroupingError
from muonscale.optim.matrices.spec import MatrixSpec
from muonscale.optim.options import option_names
from tests.optim.compare import Build, SetGradients, close, snapshot, states


def test_a_group_can_have_every_option_that_parameter_groups_lets_through() -> None:
    optimizer = Muon([nn.Parameter(torch.zeros(2, 2))])
    settled = {"rule", "momentum_convention"}
    assert set(optimizer.defaults) - settled == option_names()


def test_zero_is_not_taken_for_unset(toy: nn.Module, set_gradients: SetGradients) -> None:
    overrides = {"hidden": {"lr": 0.0, "weight_decay": 0.0}}
    optimizer = Muon(parameter_groups(toy, lr=1e-2, overrides=overrides))
    before = snapshot(toy)
    set_gradients(toy, 0)
    optimizer.step()
    assert torch.equal(toy.get_parameter("up.weight").detach(), before["up.weight"])
    assert not torch.equal(toy.get_parameter("out.weight").detach(), before["out.weight"])


def test_state_exists_from_construction(toy: nn.Module) -> None:
    optimizer = Muon(parameter_groups(toy, lr=1e-2))
    found = {name: set(state) for name, state in states(optimizer).items()}
    assert found["up.weight"] == {"momentum_buffer"}
    assert found["out.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    assert len(found) == len(list(toy.parameters()))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_steps_like_the_original(toy, set_gradients: SetGradients, clone) -> None:
    optimizer = Muon(parameter_groups(toy, lr=0.1), nonfinite="skip")
    set_gradients(toy, 0)
    optimizer.step()
    model, copied = clone((list(toy.parameters()), optimizer))
    set_gradients(toy, 1)
    for mine, other in zip(toy.parameters(), model, strict=True):
        other.grad = mine.grad.clone()
    optimizer.step()
    copied.step()
    assert all(torch.equal(a, b) for a, b in zip(toy.parameters(), model, strict=True))
    assert copied.stats()["matrices"] == 4


def test_named_and_unnamed_tensors_are_taken(toy: nn.Module) -> None:
    matrices = [toy.get_parameter("up.weight"), toy.get_parameter("down.weight")]
    assert Muon(matrices).param_groups[0]["param_names"] == ["parameter0", "parameter1"]
    named = Muon([("a", matrices[0]), ("b", matrices[1])])
    assert named.param_groups[0]["param_names"] == ["a", "b"]
    mixed = Muon([{"params": [matrices[0]]}, {"params": [matrices[1]], "rule": "adamw"}])
    assert [g["param_names"] for g in mixed.param_groups] == [["parameter0"], ["parameter1"]]


def test_groups_of_the_caller_are_not_written_to(toy: nn.Module) -> None:
    groups = parameter_groups(toy, lr=1e-3)
    keys = [set(group) for group in groups]
    optimizer = Muon(groups)
    optimizer.param_groups[0]["lr"] = 7.0
    assert [set(group) for group in groups] == keys
    assert groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4)])
def test_what_is_not_one_matrix_is_refused_with_a_way_out(shape: tuple[int, ...]) -> None:
    with pytest.raises(GroupingError, match="parameter_groups"):
        Muon([nn.Parameter(torch.zeros(shape))])


def test_a_stack_is_taken_where_the_group_says_so() -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 4, 6))
    apart = [nn.Parameter(w.clone()) for w in stack.detach()]
    stack.grad = torch.randn(3, 4, 6)
    for parameter, g in zip(apart, stack.grad, strict=True):
        parameter.grad = g.clone()
    group = {"params": [stack], "param_names": ["experts"], "matrices": {"experts": MatrixSpec()}}
    Muon([group], lr=0.1).step()
    Muon(apart, lr=0.1).step()
    close(stack.detach(), torch.stack(apart).detach(), 1e-6)


def test_a_parameter_given_twice_is_refused(toy: nn.Module) -> None:
    W = toy.get_parameter("up.weight")
    with pytest.raises(GroupingError, match="given twice"):
        Muon([{"params": [W]}, {"params": [W], "rule": "adamw"}])
    with pytest.raises(GroupingError, match="given twice"):
        Muon([W, W])
    with pytest.raises(GroupingError, match="two parameters are called a"):
        Muon([("a", W), ("a", toy.get_parameter("down.weight"))])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"momentum": 1.0},
        {"betas": (0.9, 1.0)},
        {"rms": -0.1},
        {"eps": float("nan")},
        {"scale": "rsm"},
        {"ns_coefficients": "jordon"},
        {"ns_steps": 0},
        {"ns_dtype": "float8"},
        {"nonfinite": "ignore"},
        {"ns_form": "grahm"},
        {"post_norm": "rows"},
        {"post_norm_eps": 0.0},
        {"normuon_beta2": 1.0},
        {"decay": "l2"},
        {"master": "bf16"},
        {"compile": "inducter"},
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Muon([nn.Parameter(torch.zeros(2, 2))], **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_training_lowers_the_loss(kind: str, build_lm: Build) -> None:
    model = build_lm(kind)
    optimizer = Muon(parameter_groups(model, lr=1e-2))
    ids = torch.arange(48).view(2, 24)
    losses = []
    for _ in range(16):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
