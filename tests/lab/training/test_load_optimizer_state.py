"""Optimizer state from files of this project's optimizer, of torch's, and of stand-ins for others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonscale import Muon, parameter_groups
from muonscale.errors import CheckpointError, ConfigError
from muonscale.lab.config.sections import OptimizerSection
from muonscale.lab.training.load_optimizer_state import load_optimizer_state
from muonscale.optim.migrate.convert_state import SOURCES
from tests.optim.conftest import Toy, causal_lm, randomize_gradients

Rules = dict[str, str]


def rules_of(model: nn.Module) -> Rules:
    groups = parameter_groups(model, lr=0.1)
    return {
        name: group["rule"]
        for group in groups
        for name in group["param_names"]
    }  # fmt: skip


def ours(model: nn.Module, **options: Any) -> Muon:
    return Muon(parameter_groups(model, lr=0.1, weight_decay=0.3), **options)


def stepped(model: nn.Module) -> Muon:
    optimizer = ours(model)
    for seed in range(3):
        randomize_gradients(model, seed)
        optimizer.step()
    return optimizer


def take_over(model: nn.Module, content: Any, folder: Path, source: str | None = None) -> Muon:
    path = folder / "state.pt"
    torch.save(content, path)
    optimizer = ours(model, momentum=0.8)
    load_optimizer_state(model, optimizer, path, source)
    return optimizer


def values(optimizer: Muon) -> dict[str, dict[str, Tensor]]:
    return {
        name: dict(optimizer.state[parameter])
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def check_same(optimizer: Muon, other: Muon) -> None:
    found, expected = values(optimizer), values(other)
    assert found.keys() == expected.keys()
    for name, state in expected.items():
        for key, value in state.items():
            torch.testing.assert_close(found[name][key], value, msg=f"{key} of {name}")


def test_the_formats_are_the_table_of_sources() -> None:
    annotation = OptimizerSection.model_fields["state_format"].annotation
    (literal,) = (a for a in annotation.__args__ if a is not type(None))  # type: ignore[union-attr]
    assert literal.__args__ == tuple(SOURCES)


@pytest.mark.parametrize("kind", ["toy", "gpt2", "deepseek_v3"])
def test_our_own_state_is_taken_over_and_its_options_are_not(kind: str, tmp_path: Path) -> None:
    model = Toy() if kind == "toy" else causal_lm(kind)
    before = stepped(model)
    content = before.state_dict()
    for group in content["param_groups"]:
        group["lr"], group["weight_decay"], group["strange"] = 7.0, 8.0, 9
    (tmp_path / "state.pt").touch()
    again = ours(model, momentum=0.8)
    options = [{k: v for k, v in group.items() if k != "params"} for group in again.param_groups]
    torch.save(content, tmp_path / "state.pt")
    said = load_optimizer_state(model, again, tmp_path / "state.pt", None)
    number = len(list(model.parameters()))
    assert f"state of {number} of {number} parameters" in said and "(muonscale)" in said
    check_same(again, before)
    assert [
        {k: v for k, v in group.items() if k != "params"} for group in again.param_groups
    ] == options


def test_another_grouping_is_no_obstacle(tmp_path: Path) -> None:
    model = Toy()
    before = stepped(model)
    path = tmp_path / "state.pt"
    torch.save(before.state_dict(), path)
    groups = parameter_groups(model, lr=0.1, overrides={"up.weight": {"lr": 0.2}})
    again = Muon(groups)
    load_optimizer_state(model, again, path, None)
    check_same(again, before)
    assert sorted({group["lr"] for group in again.param_groups}) == [0.1, 0.2]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", ["toy", "llama", "gpt2"])
def test_torchs_pair_is_taken_over(named: bool, kind: str, tmp_path: Path) -> None:
    model = Toy() if kind == "toy" else causal_lm(kind)
    rules = rules_of(model)
    if (
        kind == "gpt2"
    ):  # whose matrices lie transposed and fused: torch's Muon takes them as they are
        assert "muon" in rules.values()
    parts: list[torch.optim.Optimizer] = []
    for rule, make in (("muon", torch.optim.Muon), ("adamw", torch.optim.AdamW)):
        chosen = [(n, p) for n, p in model.named_parameters() if rules[n] == rule]
        parts.append(make(chosen if named else [p for _, p in chosen], lr=0.01))
    for seed in range(2):
        randomize_gradients(model, seed)
        for part in parts:
            part.step()
    saved = [part.state_dict() for part in parts]
    content = saved if named else {"muon": saved[0], "adamw": saved[1]}
    optimizer = take_over(model, content, tmp_path, "torch")
    parameters = dict(model.named_parameters())
    for name, state in values(optimizer).items():
        theirs = parts[0 if rules[name] == "muon" else 1].state[parameters[name]]
        for key, value in state.items():
            assert torch.equal(value, theirs[key].reshape(value.shape)), (name, key)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    assert {g["momentum"] for g in optimizer.param_groups if g["rule"] == "muon"} == {0.8}


def moonlight(model: nn.Module) -> dict[str, Any]:
    """A state as Moonlight's toy_train.py has it: one group, first the matrices, momentum a sum."""
    rules = rules_of(model)
    order = rules_in_order(model, rules, "muon") + rules_in_order(model, rules, "adamw")
    parameters, state = dict(model.named_parameters()), {}
    for number, name in enumerate(order):
        shape = parameters[name].shape
        if rules[name] == "muon":
            state[number] = {
                "use_muon": True,
                "momentum_buffer": torch.randn(shape[0], shape[1:].numel()),
            }
        else:
            state[number] = {
                "use_muon": False, "step": 5, "moment1": torch.randn(shape), "moment2": torch.rand(shape),
            }  # fmt: skip
    group = {
        "params": list(state),
        "lr": 0.1,
        "wd": 0.1,
        "momentum": 0.9,
        "adamw_betas": (0.9, 0.95),
    }
    return {"state": state, "param_groups": [group], "order": order}


def rules_in_order(model: nn.Module, rules: Rules, rule: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if rules[name] == rule]


@pytest.mark.parametrize("kind", ["toy", "llama", "deepseek_v3"])
def test_moonlights_sum_becomes_an_average(kind: str, tmp_path: Path) -> None:
    model = Toy() if kind == "toy" else causal_lm(kind)
    content = moonlight(model)
    order = content.pop("order")
    optimizer = take_over(model, content, tmp_path, "moonlight")
    for number, name in enumerate(order):
        state, theirs = values(optimizer)[name], content["state"][number]
        if theirs["use_muon"]:
            expected = theirs["momentum_buffer"].reshape(state["momentum_buffer"].shape) * (1 - 0.9)
            torch.testing.assert_close(state["momentum_buffer"], expected)
        else:
            assert torch.equal(state["exp_avg"], theirs["moment1"]) and float(state["step"]) == 5


def test_parameters_sorted_by_size_are_distinguished(tmp_path: Path) -> None:
    """KellerJordan/Muon sorts the parameters of a group."""
    model = causal_lm("llama")
    rules, parameters = rules_of(model), dict(model.named_parameters())
    order = sorted(
        rules_in_order(model, rules, "muon"), key=lambda n: parameters[n].size(), reverse=True
    )
    assert order != rules_in_order(model, rules, "muon")
    adamw = rules_in_order(model, rules, "adamw")
    state: dict[int, Any] = {
        k: {"momentum_buffer": torch.randn(parameters[n].shape)} for k, n in enumerate(order)
    }
    for k, n in enumerate(adamw, len(order)):
        shape = parameters[n].shape
        state[k] = {"exp_avg": torch.randn(shape), "exp_avg_sq": torch.rand(shape), "step": 2}
    groups = [
        {"params": list(range(len(order))), "lr": 0.02, "momentum": 0.95, "weight_decay": 0, "use_muon": True},
        {"params": list(range(len(order), len(state))), "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10,
         "weight_decay": 0, "use_muon": False},
    ]  # fmt: skip
    path = tmp_path / "state.pt"
    torch.save({"state": state, "param_groups": groups}, path)
    optimizer = ours(model)
    said = load_optimizer_state(model, optimizer, path, "keller")
    assert "by rule, shape and order" in said
    found = values(optimizer)
    for k, name in enumerate(order + adamw):
        key = "momentum_buffer" if k < len(order) else "exp_avg"
        assert torch.equal(found[name][key], state[k][key]), name


def test_a_parameter_that_had_no_gradient_starts_at_zero_and_is_counted(tmp_path: Path) -> None:
    model = Toy()
    rules = rules_of(model)
    parts = [
        make([(n, p) for n, p in model.named_parameters() if rules[n] == rule])
        for rule, make in (("muon", torch.optim.Muon), ("adamw", torch.optim.AdamW))
    ]
    randomize_gradients(model, 0)
    model.up.weight.grad = None
    for part in parts:
        part.step()
    path = tmp_path / "state.pt"
    torch.save([part.state_dict() for part in parts], path)
    optimizer = ours(model)
    assert f"state of {len(rules) - 1} of {len(rules)}" in load_optimizer_state(
        model, optimizer, path, "torch"
    )
    assert not values(optimizer)["up.weight"]["momentum_buffer"].any()


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    state = stepped(causal_lm("llama")).state_dict()
    with pytest.raises(CheckpointError, match=r"state\.pt.*\n  missing: down") as error:
        take_over(Toy(), state, tmp_path)
    assert "more" in str(error.value) and len(str(error.value).splitlines()) < 12
    with pytest.raises(CheckpointError, match=r"weight: saved with"):
        model = Toy()
        take_over(model, Muon(parameter_groups(model, lr=0.1, rule="adamw")).state_dict(), tmp_path)
    wide = Toy()
    wide.up = nn.Linear(8, 32, bias=False)
    wide.down = nn.Linear(32, 8, bias=False)
    with pytest.raises(CheckpointError, match=r"down\.weight.*\(8, 32\).*\(8, 24\)"):
        take_over(Toy(), stepped(wide).state_dict(), tmp_path)
    named = torch.optim.AdamW(wide.named_parameters())
    randomize_gradients(wide, 0)
    named.step()
    with pytest.raises(CheckpointError, match=r"exp_avg of up.weight has the shape \(32, 8\)"):
        take_over(Toy(), named.state_dict(), tmp_path, "torch")
    content = moonlight(wide)
    content.pop("order")
    with pytest.raises(CheckpointError, match=r"more parameters of the shape \(32, 8\) on muon"):
        take_over(Toy(), content, tmp_path, "moonlight")
    deep = causal_lm("llama")
    content = moonlight(deep)
    content.pop("order")
    del content["state"][0]
    with pytest.raises(CheckpointError, match=r"parameter 0"):
        take_over(deep, content, tmp_path, "moonlight")


def test_a_pair_without_its_other_half_is_refused(tmp_path: Path) -> None:
    model = Toy()
    rules = rules_of(model)
    muon = torch.optim.Muon([(n, p) for n, p in model.named_parameters() if rules[n] == "muon"])
    randomize_gradients(model, 0)
    muon.step()
    with pytest.raises(CheckpointError, match=r"missing: first\.bias"):
        take_over(model, muon.state_dict(), tmp_path, "torch")
    with pytest.raises(CheckpointError, match=r"a parameter called first\.weight"):
        take_over(model, [muon.state_dict()] * 2, tmp_path, "torch")


def test_files_that_hold_no_state_are_refused(tmp_path: Path) -> None:
    model = Toy()
    optimizer = ours(model)
    with pytest.raises(CheckpointError, match=r"none\.pt cannot be read"):
        load_optimizer_state(model, optimizer, tmp_path / "none.pt", None)
    path = tmp_path / "state.pt"
    path.write_text("no state")
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        load_optimizer_state(model, optimizer, path, None)
    torch.save(model, path)  # code, which weights_only refuses
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        load_optimizer_state(model, optimizer, path, None)
    for content, has in (
        ({"model": {}, "step": 3}, r"'model', 'step'"),
        (torch.ones(3), "Tensor"),
        ([], "list"),
    ):
        with pytest.raises(CheckpointError, match=has):
            take_over(model, content, tmp_path)


def test_whose_state_it_is_has_to_be_said(tmp_path: Path) -> None:
    model = Toy()
    adamw = torch.optim.AdamW(model.named_parameters())
    with pytest.raises(ConfigError, match=r"optimizer\.state_format=torch .*moonlight"):
        take_over(model, adamw.state_dict(), tmp_path)
    content = copy.deepcopy(stepped(model).state_dict())
    with pytest.raises(CheckpointError):
        take_over(model, [content, content], tmp_path, "torch")
