"""State follows parameters by name when somebody replaces, moves or casts them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from muonscale import Muon, parameter_groups
from muonscale.errors import GroupingError, LayoutError
from tests.optim.compare import SetGradients, equal, snapshot, states


def trained(model: nn.Module, set_gradients: SetGradients, **options) -> Muon:
    optimizer = Muon(parameter_groups(model, lr=0.1), post_norm="normuon", **options)
    for seed in range(2):
        set_gradients(model, seed)
        optimizer.step()
    return optimizer


def replaced(model: nn.Module, optimizer: Muon) -> dict[Tensor, Tensor]:
    """Do as Accelerate does: new parameters in the model, and in the groups, none in the state."""
    new: dict[Tensor, Tensor] = {}
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        new[parameter] = nn.Parameter(parameter.detach().clone())
        setattr(model.get_submodule(owner), leaf, new[parameter])
    for group in optimizer.param_groups:
        group["params"] = [new[parameter] for parameter in group["params"]]
    return new


@pytest.mark.parametrize("save_first", [False, True])
def test_a_replaced_parameter_keeps_its_state(toy, set_gradients, save_first: bool) -> None:
    twin = copy.deepcopy(toy)
    moved, plain = trained(toy, set_gradients), trained(twin, set_gradients)
    new = replaced(toy, moved)
    if save_first:
        assert equal(moved.state_dict()["state"], plain.state_dict()["state"])
    for seed in range(2, 4):
        for model, optimizer in ((toy, moved), (twin, plain)):
            set_gradients(model, seed)
            optimizer.step()
    assert equal(snapshot(toy), snapshot(twin))
    assert equal(states(moved), states(plain))
    assert not set(new) & set(moved.state)  # nothing is kept of the old ones


def test_loading_goes_to_the_replaced_parameters(toy, set_gradients: SetGradients) -> None:
    optimizer = trained(toy, set_gradients)
    saved = copy.deepcopy(optimizer.state_dict())
    set_gradients(toy, 5)
    optimizer.step()
    replaced(toy, optimizer)
    optimizer.load_state_dict(saved)
    assert equal(optimizer.state_dict()["state"], saved["state"])


def test_parameters_that_change_places_keep_their_own_state(toy, set_gradients) -> None:
    optimizer = trained(toy, set_gradients)
    before = states(optimizer)
    for group in optimizer.param_groups:
        group["params"].reverse()
        group["param_names"].reverse()
    set_gradients(toy, 5)
    for parameter in toy.parameters():
        parameter.grad = None
    optimizer.step()
    assert equal(states(optimizer), before)


def test_casting_the_model_carries_the_state_over(toy, set_gradients: SetGradients) -> None:
    optimizer = trained(toy, set_gradients)
    before = states(optimizer)
    toy.double()
    for parameter in toy.parameters():
        parameter.grad = None
    optimizer.step()
    for name, state in states(optimizer).items():
        for key, value in state.items():
            assert value.dtype == (torch.float32 if key == "step" else torch.float64)
            assert torch.equal(value.float(), before[name][key])


def test_casting_to_16_bits_starts_float32_copies_and_casting_back_ends_them(
    toy: nn.Module, set_gradients: SetGradients
) -> None:
    optimizer = trained(toy, set_gradients, master="float32")
    toy.bfloat16()
    set_gradients(toy, 0)
    optimizer.step()
    kept = states(optimizer)
    assert all("master" in state for state in kept.values())
    assert {state[key].dtype for state in kept.values() for key in state} == {torch.float32}
    for parameter in toy.parameters():
        assert torch.equal(optimizer.state[parameter]["master"].bfloat16(), parameter)
    toy.float()
    set_gradients(toy, 0)
    optimizer.step()
    assert not any("master" in state for state in states(optimizer).values())


def test_a_group_whose_option_needs_more_state_gets_it(toy, set_gradients: SetGradients) -> None:
    optimizer = Muon(parameter_groups(toy, lr=0.1))
    set_gradients(toy, 0)
    optimizer.step()
    before = states(optimizer)
    optimizer.param_groups[0]["post_norm"] = "normuon"
    for parameter in toy.parameters():
        parameter.grad = None
    optimizer.step()
    after = states(optimizer)["up.weight"]
    assert torch.equal(after["row_second_moment"], torch.zeros(24, 1))
    assert torch.equal(after["momentum_buffer"], before["up.weight"]["momentum_buffer"])


def test_cleared_state_starts_anew(toy: nn.Module, set_gradients: SetGradients) -> None:
    fresh = copy.deepcopy(toy)
    optimizer = trained(toy, set_gradients)
    optimizer.state.clear()
    with torch.no_grad():
        for mine, other in zip(toy.parameters(), fresh.parameters(), strict=True):
            mine.copy_(other)
    other = Muon(parameter_groups(fresh, lr=0.1), post_norm="normuon")
    for model, each in ((toy, optimizer), (fresh, other)):
        set_gradients(model, 9)
        each.step()
    assert equal(snapshot(toy), snapshot(fresh))


def test_another_shape_or_number_of_parameters_is_refused(toy, set_gradients) -> None:
    optimizer = trained(toy, set_gradients)
    before = states(optimizer)
    group = optimizer.param_groups[0]
    held = group["params"][0]
    group["params"][0] = nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(LayoutError, match=r"first.weight .*\(8, 8\).*\(3, 5\)"):
        optimizer.step()
    group["params"][0] = held
    assert equal(states(optimizer), before)
    group["params"].append(nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(GroupingError, match="5 parameters and 4 param_names"):
        optimizer.step()


def test_a_group_added_later_joins(toy: nn.Module, set_gradients: SetGradients) -> None:
    matrices = [toy.get_parameter("up.weight"), toy.get_parameter("down.weight")]
    optimizer = Muon([("up", matrices[0])], lr=0.1)
    optimizer.add_param_group({"params": [("down", matrices[1])], "lr": 0.2})
    before = matrices[1].detach().clone()
    set_gradients(toy, 0)
    optimizer.step()
    assert optimizer.stats()["matrices"] == 2
    assert not torch.equal(before, matrices[1].detach())
    assert optimizer.param_groups[1]["peak_lr"] == 0.2
