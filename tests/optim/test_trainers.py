"""What trainers do to an optimizer: schedules, closures, loss scaling, clipping, factories."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from muonscale import Muon, parameter_groups
from tests.optim.compare import SetGradients, close, equal, snapshot, states


def test_groups_keep_their_options_and_ratios_under_a_scheduler(toy: nn.Module) -> None:
    overrides = {"head": {"lr": 5e-4}, "norm": {"weight_decay": 0.0}}
    groups = parameter_groups(toy, lr=1e-3, weight_decay=0.1, overrides=overrides)
    optimizer = Muon(groups, lr=9.0, weight_decay=9.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for parameter in toy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.step()
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {
        "hidden": (5e-4, 0.1),
        "embedding": (5e-4, 0.1),
        "head": (2.5e-4, 0.1),
        "norm": (5e-4, 0.0),
    }


def test_a_closure_is_run_with_gradients_and_its_loss_returned(toy: nn.Module) -> None:
    optimizer = Muon(parameter_groups(toy, lr=1e-2))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = toy(torch.arange(5)).logsumexp(-1).mean()
        loss.backward()
        return loss

    first = optimizer.step(closure).detach()
    assert optimizer.step(closure).detach() < first


def test_one_cycle_with_a_list_of_peaks_keeps_the_ratios_of_groups(toy, set_gradients) -> None:
    overrides = {"head": {"lr": 5e-4}, "norm": {"lr": 2e-3}}
    optimizer = Muon(parameter_groups(toy, lr=1e-3, overrides=overrides))
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=10)
    seen = []
    for step in range(9):
        set_gradients(toy, step)
        optimizer.step()
        schedule.step()
        seen.append([group["lr"] for group in optimizer.param_groups])
    for rates in seen:
        assert rates == pytest.approx([peak * rates[0] / peaks[0] for peak in peaks])
    assert max(rates[0] for rates in seen) > 10 * min(rates[0] for rates in seen)
    saved = optimizer.state_dict()  # with what the schedule has put into the groups
    Muon(parameter_groups(toy, lr=1e-3, overrides=overrides)).load_state_dict(saved)


def test_independent_decay_follows_a_schedule_and_not_the_learning_rate(set_gradients) -> None:
    """Under OneCycleLR too, whose `initial_lr` is where the warm-up begins, not the peak."""
    for lr in (0.1, 0.01):
        W = nn.Parameter(torch.ones(4, 4))
        optimizer = Muon([W], lr=lr, weight_decay=0.25, decay="independent")
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=[lr], total_steps=4, pct_start=0.5, cycle_momentum=False
        )
        expected = 1.0
        for _ in range(4):
            W.grad = torch.zeros(4, 4)
            multiplier = optimizer.param_groups[0]["lr"] / lr
            assert 0 <= multiplier <= 1
            expected *= 1 - 0.25 * multiplier
            optimizer.step()
            if multiplier == 1:
                break
            schedule.step()
        close(W.detach(), torch.full((4, 4), expected), 1e-6)
        assert expected < 0.75


@pytest.mark.parametrize("first", [True, False])
def test_a_grad_scaler_skips_an_overflow_and_goes_on(toy, set_gradients, first: bool) -> None:
    twin = copy.deepcopy(toy)
    scaled = Muon(parameter_groups(toy, lr=0.1), post_norm="normuon")
    plain = Muon(parameter_groups(twin, lr=0.1), post_norm="normuon")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    for seed in range(4):
        bad = seed == (0 if first else 2)
        before = snapshot(toy), states(scaled)
        set_gradients(toy, seed)
        for parameter in toy.parameters():
            parameter.grad.copy_(scaler.scale(parameter.grad))
        if bad:
            toy.get_parameter("norm.bias").grad[0] = float("inf")
        scaler.step(scaled)
        scaler.update()
        if bad:
            assert equal((snapshot(toy)), before[0])
            assert equal(states(scaled), before[1])
            assert scaler.get_scale() == 4.0
            continue
        set_gradients(twin, seed)
        plain.step()
    assert equal(snapshot(toy), snapshot(twin))
    assert equal(states(scaled), states(plain))
    assert scaled.stats()["skipped_steps"] == 0


def test_clipping_shortens_adamw_gradients_and_not_the_muon_step(toy, set_gradients) -> None:
    twin = copy.deepcopy(toy)
    for model, limit in ((toy, 1e-3), (twin, 1e9)):
        optimizer = Muon(parameter_groups(model, lr=0.1))
        set_gradients(model, 0)
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
    for name in ("up.weight", "second.weight"):
        close(toy.get_parameter(name).detach(), twin.get_parameter(name).detach())


def test_a_gradient_eight_times_too_large_is_seen_in_the_momentum(toy, set_gradients) -> None:
    """Neither rule's step shows a missing division by the number of micro-batches."""
    optimizer = Muon(parameter_groups(toy, lr=0.1))
    set_gradients(toy, 0)
    G = toy.get_parameter("up.weight").grad
    G.mul_(8)
    optimizer.step()
    momentum = optimizer.state[toy.get_parameter("up.weight")]["momentum_buffer"]
    close(momentum, 0.05 * G, 1e-6)


def test_a_hugging_face_schedule_drives_it(toy: nn.Module, set_gradients: SetGradients) -> None:
    from transformers import get_scheduler

    optimizer = Muon(parameter_groups(toy, lr=1e-2, overrides={"head": {"lr": 1e-3}}))
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=6)
    rates = []
    for step in range(5):
        set_gradients(toy, step)
        optimizer.step()
        schedule.step()
        found = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert found["head"] == pytest.approx(found["hidden"] / 10)
        rates.append(found["hidden"])
    assert rates[1] == pytest.approx(1e-2)
    assert rates[4] < rates[3] < rates[2] < rates[1]


def test_a_tensor_learning_rate_is_taken(toy: nn.Module, set_gradients: SetGradients) -> None:
    twin = copy.deepcopy(toy)
    for model, lr in ((toy, 0.1), (twin, torch.tensor(0.1, dtype=torch.float64))):
        optimizer = Muon(parameter_groups(model, lr=lr))
        set_gradients(model, 0)
        optimizer.step()
    assert equal(snapshot(toy), snapshot(twin))
