"""What a step makes of gradients: none, zero, not finite, of odd shapes and strides."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from muonscale import Muon, parameter_groups
from muonscale.errors import GroupingError, MuonscaleError
from muonscale.optim.rules import nonfinite as finite
from muonscale.optim.rules.post_norm import POST_NORMS
from muonscale.optim.rules.pre_norm import PRE_NORMS
from tests.optim.compare import SetGradients, close, equal, snapshot, states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.filterwarnings("ignore:.*16 bits")
def test_a_step_leaves_gradients_alone_and_momentum_is_an_average(dtype, nesterov: bool) -> None:
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(16, 24).to(dtype))
    optimizer = Muon([W], nesterov=nesterov, momentum=0.9)
    total = torch.zeros(16, 24)
    for step in range(1, 4):
        W.grad = (torch.randn(16, 24) * 100).to(dtype)
        kept = W.grad.clone()
        total = 0.9 * total + kept.float()
        optimizer.step()
        assert torch.equal(W.grad, kept)
        # a buffer that had been normalised in place would have length 1
        close(optimizer.state[W]["momentum_buffer"], 0.1 * total, 1e-4)
        assert optimizer.state[W]["momentum_buffer"].data_ptr() != W.grad.data_ptr(), step


def test_none_is_skipped_and_zero_is_a_gradient() -> None:
    torch.manual_seed(0)
    left, right = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    optimizer = Muon([left, right], lr=0.1, weight_decay=0.5)
    left.grad, right.grad = torch.randn(4, 4), torch.randn(4, 4)
    optimizer.step()
    before = {p: p.detach().clone() for p in (left, right)}
    momenta = {p: optimizer.state[p]["momentum_buffer"].clone() for p in (left, right)}
    left.grad, right.grad = None, torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(left.detach(), before[left])
    assert torch.equal(optimizer.state[left]["momentum_buffer"], momenta[left])
    assert not torch.equal(right.detach(), before[right])
    close(optimizer.state[right]["momentum_buffer"], 0.95 * momenta[right], 1e-6)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (2, 40), (0, 4), (4, 0)])
@pytest.mark.parametrize(
    ("pre_norm", "post_norm"),
    [(None, None), *((None, name) for name in POST_NORMS), *((name, None) for name in PRE_NORMS)],
)
@pytest.mark.parametrize("scale", ["rms", "rms_exact"])
def test_degenerate_shapes_and_rows_of_zeros_step(shape, pre_norm, post_norm, scale: str) -> None:
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(shape))
    options = {"pre_norm": pre_norm, "post_norm": post_norm, "post_norm_eps": 1e-30}
    optimizer = Muon([W], lr=0.1, scale=scale, **options)
    for length in (0.0, 1.0):
        W.grad = length * torch.randn(shape)
        W.grad[-1:] = 0
        optimizer.step()
        assert W.isfinite().all()
        assert optimizer.stats()["update_rms"].isfinite()
        assert all(value.isfinite().all() for value in optimizer.state[W].values())


def test_gradients_of_any_strides_give_the_same_step() -> None:
    torch.manual_seed(0)
    G = torch.randn(6, 10)
    results = []
    for gradient in (G, G.T.contiguous().T, torch.randn(6, 20)[:, ::2].copy_(G)):
        W = nn.Parameter(torch.ones(6, 10))
        W.grad = gradient
        Muon([W], lr=0.1).step()
        results.append(W.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_gradient_length_does_not_change_the_step() -> None:
    torch.manual_seed(0)
    G = torch.randn(6, 10)
    results = []
    for length in (1.0, 1e-25, 1e25):
        W = nn.Parameter(torch.zeros(6, 10))
        W.grad = G * length
        Muon([W], lr=1.0).step()
        results.append(W.detach())
    close(results[1], results[0])
    close(results[2], results[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("victim", ["norm.bias", "up.weight"])
def test_a_nonfinite_gradient_leaves_everything_as_it_was(
    toy: nn.Module, set_gradients: SetGradients, value: float, victim: str
) -> None:
    optimizer = Muon(parameter_groups(toy, lr=0.1))
    set_gradients(toy, 0)
    optimizer.step()
    before, state = snapshot(toy), states(optimizer)
    set_gradients(toy, 1)
    toy.get_parameter(victim).grad.view(-1)[3] = value
    optimizer.step()
    for name, parameter in toy.named_parameters():
        assert torch.equal(parameter.detach(), before[name])
    for name, kept in states(optimizer).items():
        assert all(torch.equal(kept[key], state[name][key]) for key in kept)
    assert optimizer.stats()["matrices"] == 0
    with pytest.raises(MuonscaleError, match=victim):
        optimizer.step()
    set_gradients(toy, 2)
    optimizer.step()  # training can go on
    optimizer.check_finite()
    assert not torch.equal(toy.get_parameter("up.weight").detach(), before["up.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [finite._LONG, finite._LONG + 1])
@pytest.mark.parametrize("rest", [0.0, 1.0, 1e30])
def test_one_nonfinite_element_of_a_long_gradient_is_found_wherever_it_is(
    value: float, size: int, rest: float
) -> None:
    gradient = torch.full((size,), rest)
    assert not finite.check_gradients(["w"], [gradient]).nonfinite_names()
    for place in (0, 1, size // 2 - 1, size // 2, size // 2 + 1, size - 1):
        gradient[place] = value
        assert finite.check_gradients(["w"], [gradient]).nonfinite_names() == ["w"], place
        gradient[place] = rest


def test_skip_counts_and_goes_on(toy: nn.Module, set_gradients: SetGradients) -> None:
    optimizer = Muon(parameter_groups(toy, lr=0.1), nonfinite="skip")
    for seed in range(4):
        set_gradients(toy, seed)
        if seed % 2:
            toy.get_parameter("norm.bias").grad[0] = float("nan")
        optimizer.step()
    optimizer.check_finite()
    assert optimizer.stats()["skipped_steps"] == 2
    assert all(p.isfinite().all() for p in toy.parameters())
    assert float(optimizer.state[toy.get_parameter("norm.bias")]["step"]) == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"post_norm": "normuon", "cautious_decay": True},
        {"second_moment": "gradient", "constraint": "radial_brake", "cautious_decay": True},
        {"second_moment": "update", "constraint": "weight_norm", "pre_norm": "row"},
        {"constraint": "row_magnitude", "master": "float32"},
        {"master": "float32"},
        {"master": "stochastic"},
    ],
)
def test_the_masked_path_equals_the_direct_one(toy, set_gradients, monkeypatch, options) -> None:
    """What a GPU runs: the host learns of a bad step only when the next one begins."""
    if "master" in options:
        toy.bfloat16()
    twin = copy.deepcopy(toy)
    direct = Muon(parameter_groups(toy, lr=0.1), nonfinite="skip", **options)
    masked = Muon(parameter_groups(twin, lr=0.1), nonfinite="skip", **options)
    check = finite.check_gradients

    def late(*arguments: Any) -> finite.FiniteCheck:
        found = check(*arguments)
        found.mask = (found.at_fault == 0).all()
        return found

    for seed in range(5):
        for model, optimizer in ((toy, direct), (twin, masked)):
            set_gradients(model, seed)
            if seed in (0, 3):
                model.get_parameter("down.weight").grad[1, 2] = float("inf")
            with monkeypatch.context() as patch:
                if optimizer is masked:
                    patch.setattr("muonscale.optim.distributed.context.check_gradients", late)
                optimizer.step()
    masked.check_finite()
    assert direct.stats()["skipped_steps"] == masked.stats()["skipped_steps"] == 2
    assert equal(snapshot(toy), snapshot(twin))
    assert equal(states(direct), states(masked))


def test_sparse_and_complex_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Muon([{"params": [embedding.weight], "rule": "adamw", "param_names": ["e"]}])
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(GroupingError, match="e has a sparse gradient"):
        optimizer.step()
    with pytest.raises(GroupingError, match="complex64"):
        Muon([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
