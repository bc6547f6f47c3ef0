"""Models that change while they train: parameters that join later, are resized, or are replaced."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from muonscale import Muon, MuonFactory, grouping_report, parameter_groups
from muonscale.errors import CheckpointError, GroupingError, LayoutError
from muonscale.optim.matrices.spec import MatrixSpec
from muonscale.optim.parameters.source import ParameterGroups
from tests.optim.compare import Build, SetGradients, close, equal, snapshot, states

FROZEN = ("tokens.weight", "second.weight", "norm.weight")


def freeze(model: nn.Module, *names: str) -> nn.Module:
    for name in names or FROZEN:
        model.get_parameter(name).requires_grad_(False)
    return model


def groups(optimizer: Muon) -> dict[str, tuple[str, list[str]]]:
    return {g["name"]: (g["rule"], g["param_names"]) for g in optimizer.param_groups}


def halving(optimizer: Muon, last_epoch: int = -1) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step, last_epoch)


MAKERS: dict[str, Callable[[nn.Module], Muon]] = {
    "of a model": lambda model: Muon(model, lr=0.1, adamw_lr=0.3),
    "of groups": lambda model: Muon(parameter_groups(model, lr=0.1, adamw_lr=0.3)),
    "of the factory": lambda model: MuonFactory()(model, lr=0.1, adamw_lr=0.3),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_group_without_a_rule_is_added_by_role(toy: nn.Module, make: Any) -> None:
    optimizer = make(freeze(toy))
    added = [toy.get_parameter(name).requires_grad_(True) for name in FROZEN]
    optimizer.add_param_group({"params": iter(added), "weight_decay": 0.5})
    found = groups(optimizer)
    assert found["hidden#2"] == ("muon", ["second.weight"])
    assert found["embedding"] == ("adamw", ["tokens.weight"])
    assert found["norm#2"] == ("adamw", ["norm.weight"])
    new = optimizer.param_groups[-3:]
    assert {g["weight_decay"] for g in new} == {0.5}
    assert {g["name"]: g["lr"] for g in new} == {"hidden#2": 0.1, "embedding": 0.3, "norm#2": 0.3}


def test_a_group_without_a_rule_is_refused_where_the_model_is_not_known(toy: nn.Module) -> None:
    optimizer = Muon(list(parameter_groups(freeze(toy), lr=0.1)))
    tokens = toy.get_parameter("tokens.weight").requires_grad_(True)
    with pytest.raises(GroupingError, match="rule"):
        optimizer.add_param_group({"params": [tokens]})
    assert "embedding" not in groups(optimizer)
    optimizer.add_param_group({"params": [("tokens.weight", tokens)], "rule": "adamw"})
    assert optimizer.param_groups[-1]["param_names"] == ["tokens.weight"]


def test_a_group_with_a_rule_gets_names_and_matrices_of_the_model(build_lm: Build) -> None:
    model = build_lm("gpt2")
    fused = "transformer.h.0.attn.c_attn.weight"
    optimizer = Muon(freeze(model, fused), lr=0.1)
    weight = model.get_parameter(fused).requires_grad_(True)
    optimizer.add_param_group({"params": [weight], "rule": "muon", "lr": 0.2})
    group = optimizer.param_groups[-1]
    assert group["param_names"] == [fused]
    assert group["matrices"] == {fused: MatrixSpec(transposed=True, splits=(16, 16, 16))}


def test_what_cannot_be_a_group_is_refused(toy: nn.Module) -> None:
    optimizer = Muon(freeze(toy), lr=0.1)
    before = groups(optimizer)
    wrong: list[Any] = [
        parameter_groups(nn.Linear(2, 2)),
        nn.Linear(2, 2),
        {"params": [nn.Parameter(torch.ones(3, 3))]},  # is in no model
        {"params": [toy.get_parameter("second.weight")]},  # is frozen
    ]
    for group in wrong:
        with pytest.raises(GroupingError):
            optimizer.add_param_group(group)
    assert groups(optimizer) == before


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_unfrozen_parameters_join_the_group_of_their_role(
    toy: nn.Module, set_gradients: SetGradients, make: Any
) -> None:
    optimizer = make(freeze(toy, "second.weight", "norm.weight"))
    names = list(groups(optimizer))
    scheduler = halving(optimizer)
    for step in range(3):
        if step == 1:
            assert optimizer.unfreeze("second.*") == ["second.weight"]
            assert optimizer.unfreeze(toy.get_submodule("norm")) == ["norm.weight"]
            assert optimizer.unfreeze(toy) == []
        set_gradients(toy, step)
        before = snapshot(toy)
        optimizer.step()
        scheduler.step()
        moved = {name for name, p in toy.named_parameters() if not torch.equal(p, before[name])}
        assert ("second.weight" in moved) == (step > 0)
        assert ("norm.weight" in moved) == (step > 0)
    assert list(groups(optimizer)) == names
    assert groups(optimizer)["hidden"][0] == "muon"
    assert "second.weight" in groups(optimizer)["hidden"][1]
    assert "norm.weight" in groups(optimizer)["norm"][1]
    assert {g["lr"] for g in optimizer.param_groups} == {0.1 / 8, 0.3 / 8}
    assert len(grouping_report(optimizer, toy).rows) == len(list(toy.parameters()))


def test_a_step_of_what_was_unfrozen_is_that_of_a_new_optimizer(
    toy: nn.Module, set_gradients: SetGradients
) -> None:
    optimizer = Muon(freeze(toy), lr=0.1)
    optimizer.unfreeze(FROZEN)
    twin = copy.deepcopy(toy)
    for model, each in ((toy, optimizer), (twin, Muon(twin, lr=0.1))):
        set_gradients(model, 0)
        each.step()
    assert equal(snapshot(toy), snapshot(twin))
    other = Muon(twin, lr=9.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every group is found by its parameters
        other.load_state_dict(optimizer.state_dict())
    assert equal(states(other), states(optimizer))


def test_a_role_without_a_group_gets_one_that_has_gone_the_way_of_the_schedule(
    toy: nn.Module, set_gradients: SetGradients
) -> None:
    whole, part = copy.deepcopy(toy), freeze(toy, "tokens.weight")
    optimizers = [Muon(model, lr=0.1, adamw_lr=0.3) for model in (whole, part)]
    schedulers = [halving(optimizer) for optimizer in optimizers]
    for optimizer, scheduler, model in zip(optimizers, schedulers, (whole, part), strict=True):
        for seed in range(2):
            set_gradients(model, seed)
            optimizer.step()
            scheduler.step()
    assert optimizers[1].unfreeze(part.get_submodule("tokens")) == ["tokens.weight"]
    new = optimizers[1].param_groups[-1]
    expected = next(g for g in optimizers[0].param_groups if g["name"] == "embedding")
    assert new["rule"] == "adamw"
    for key in ("lr", "initial_lr", "peak_lr"):
        assert new[key] == pytest.approx(expected[key])
    later = halving(optimizers[1], last_epoch=schedulers[1].last_epoch)
    assert sorted(later.get_last_lr()) == pytest.approx([0.1 / 8, 0.3 / 8, 0.3 / 8, 0.3 / 8])


def test_overrides_hold_for_what_joins_later(toy: nn.Module) -> None:
    overrides = {"*.weight": {"weight_decay": 0.4}, "up.*": {"lr": 0.7}, "second.*": {"lr": 0.6}}
    freeze(toy, "down.weight")
    optimizer = Muon(parameter_groups(toy, lr=0.1, overrides=overrides))
    before = list(groups(optimizer))
    optimizer.unfreeze("down.weight")
    assert list(groups(optimizer)) == before
    group = next(g for g in optimizer.param_groups if "down.weight" in g["param_names"])
    assert (group["rule"], group["lr"], group["weight_decay"]) == ("muon", 0.1, 0.4)


def test_a_module_that_was_added_to_the_model_joins(
    toy: nn.Module, set_gradients: SetGradients
) -> None:
    optimizer = Muon(toy, lr=0.1)
    toy.more = nn.Linear(8, 8)
    assert optimizer.unfreeze(toy.more) == ["more.weight", "more.bias"]
    set_gradients(toy, 0)
    before = snapshot(toy)
    optimizer.step()
    assert not torch.equal(toy.more.weight, before["more.weight"])
    assert "more.weight" in groups(optimizer)["hidden"][1]
    assert "more.bias" in groups(optimizer)["norm"][1]


def test_what_cannot_be_unfrozen_stays_frozen(toy: nn.Module) -> None:
    optimizer = Muon(freeze(toy), lr=0.1)
    for what in ("secnd.weight", nn.Linear(2, 2)):
        with pytest.raises(GroupingError):
            optimizer.unfreeze(what)
    assert not any(toy.get_parameter(name).requires_grad for name in FROZEN)


def test_a_model_that_the_optimizer_does_not_know_is_given(toy: nn.Module) -> None:
    optimizer = copy.deepcopy(Muon(freeze(toy), lr=0.1))
    with pytest.raises(GroupingError, match="model"):
        optimizer.unfreeze("second.*")
    optimizer = Muon(list(parameter_groups(toy, lr=0.1)))
    with pytest.raises(GroupingError, match="model"):
        optimizer.unfreeze(toy.get_submodule("second"))
    assert optimizer.unfreeze("second.*", model=toy) == ["second.weight"]
    assert optimizer.unfreeze(toy) == ["tokens.weight", "norm.weight"]


def test_groups_can_be_copied_pickled_and_added_up(toy: nn.Module) -> None:
    made = parameter_groups(toy, lr=0.1)
    assert isinstance(made, ParameterGroups)
    assert made.source.model is toy
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), [*made]):
        assert type(copied) is list
        assert [g["param_names"] for g in copied] == [g["param_names"] for g in made]


def test_a_vocabulary_resized_after_the_optimizer_was_made_is_named(
    build_lm: Build, set_gradients: SetGradients
) -> None:
    model = build_lm("llama")
    optimizer = Muon(model, lr=0.1)
    set_gradients(model, 0)
    optimizer.step()
    old = optimizer.state_dict()
    model.resize_token_embeddings(60)  # type: ignore[operator]
    set_gradients(model, 1)
    before = snapshot(model)
    # transformers resizes the table in place and replaces the head.
    with pytest.raises(LayoutError, match=r"embed_tokens.weight .*\(50, 16\).*\(60, 16\)"):
        optimizer.step()
    assert equal(snapshot(model), before)
    with pytest.raises(GroupingError, match=r"lm_head.weight"):
        grouping_report(optimizer, model)
    assert equal(optimizer.state_dict()["state"], old["state"])
    fresh = Muon(model, lr=0.1)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight.*\(50, 16\).*\(60, 16\)"):
        fresh.load_state_dict(old)
    result = fresh.load_state_dict(old, strict=False)
    assert set(result.mismatched_keys) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert not result.missing_keys
    assert not result.unexpected_keys
    taken, kept = states(fresh), states(optimizer)
    for name, state in taken.items():
        if name in result.mismatched_keys:
            assert not any(value.any() for value in state.values())
        else:
            assert equal(state, kept[name])
    fresh.step()


@pytest.mark.parametrize("cleared", [True, False])
def test_parameters_that_were_replaced_are_named_when_the_new_ones_have_gradients(
    toy: nn.Module, set_gradients: SetGradients, cleared: bool
) -> None:
    optimizer = Muon(parameter_groups(toy, lr=0.1))
    set_gradients(toy, 0)
    optimizer.step()
    if cleared:
        optimizer.zero_grad()
    toy.tokens, toy.out = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
    optimizer.step()  # nothing new has a gradient yet
    set_gradients(toy, 1)
    before = snapshot(toy)
    with pytest.raises(GroupingError, match=r"tokens.weight.*(30, 8)"):
        optimizer.step()
    assert equal(snapshot(toy), before)
    with pytest.raises(GroupingError, match=r"tokens.weight.*out.weight"):
        grouping_report(optimizer, toy)


def test_a_parameter_resized_in_place_is_named(toy: nn.Module, set_gradients: SetGradients) -> None:
    optimizer = Muon(toy, lr=0.1)
    set_gradients(toy, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict()["state"])
    for name, shape in (("tokens.weight", (30, 8)), ("up.weight", (25, 8)), ("norm.bias", (9,))):
        parameter = toy.get_parameter(name)
        held = parameter.data
        parameter.data = torch.zeros(shape)
        parameter.grad = torch.ones(shape)
        with pytest.raises(LayoutError, match=f"{name} ") as error:
            optimizer.step()
        assert str(shape) in str(error.value)
        assert str(tuple(held.shape)) in str(error.value)
        assert equal(optimizer.state_dict()["state"], saved)
        parameter.data, parameter.grad = held, None
    optimizer.step()


def test_two_optimizers_on_parts_of_a_model_do_not_disturb_each_other(
    toy: nn.Module, set_gradients: SetGradients
) -> None:
    first = Muon(freeze(toy), lr=0.1)
    for name in FROZEN:
        toy.get_parameter(name).requires_grad_(True)
    second = Muon([{"params": [toy.get_parameter("norm.weight")], "rule": "adamw"}])
    set_gradients(toy, 0)
    before = snapshot(toy)
    first.step()
    second.step()
    assert not torch.equal(toy.get_parameter("norm.weight"), before["norm.weight"])
    assert not torch.equal(toy.get_parameter("up.weight"), before["up.weight"])


def test_a_model_cast_to_16_bits_is_warned_of_once(
    toy: nn.Module, set_gradients: SetGradients
) -> None:
    optimizer = Muon(toy, lr=0.1)
    toy.bfloat16()
    set_gradients(toy, 0)
    with pytest.warns(UserWarning, match=r"11 parameters .*16 bits|\d+ parameters .*16 bits"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.filterwarnings("ignore:parameter group")
def test_state_that_fits_is_taken_over_by_name(toy: nn.Module, set_gradients: SetGradients) -> None:
    optimizer = Muon(toy, lr=0.1, post_norm="normuon")
    set_gradients(toy, 0)
    optimizer.step()
    saved, old = optimizer.state_dict(), states(optimizer)
    twin = copy.deepcopy(toy)
    del twin.up
    twin.up_proj = nn.Linear(8, 24, bias=False)
    twin.out = nn.Linear(8, 30, bias=False)
    other = Muon(parameter_groups(twin, lr=0.7, overrides={"second.weight": {"rule": "adamw"}}))
    result = other.load_state_dict(saved, strict=False)
    assert result.missing_keys == ["up_proj.weight"]
    assert result.unexpected_keys == ["up.weight"]
    assert set(result.mismatched_keys) == {
        *("out.weight", "second.weight"),  # another shape, another rule
        *("first.weight", "down.weight"),  # row_second_moment is left out
    }
    new = states(other)
    for name in ("first.weight", "down.weight"):
        assert new[name].keys() == {"momentum_buffer"}
        assert torch.equal(new[name]["momentum_buffer"], old[name]["momentum_buffer"])
    for name in ("up_proj.weight", "out.weight", "second.weight"):
        assert not any(value.any() for value in new[name].values())
    assert equal(new["tokens.weight"], old["tokens.weight"])
    assert optimizer.load_state_dict(saved) == ([], [], {})


def test_state_of_a_rule_with_more_state_starts_what_is_missing(
    toy: nn.Module, set_gradients: SetGradients
) -> None:
    plain = Muon(toy, lr=0.1)
    set_gradients(toy, 0)
    plain.step()
    other = Muon(toy, lr=0.1, post_norm="normuon")
    result = other.load_state_dict(plain.state_dict(), strict=False)
    assert all("post_norm" in how[0] for how in result.mismatched_keys.values())
    state = states(other)["up.weight"]
    close(state["momentum_buffer"], states(plain)["up.weight"]["momentum_buffer"])
    assert not state["row_second_moment"].any()
