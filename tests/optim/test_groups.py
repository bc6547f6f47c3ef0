from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from muonscale.errors import ConfigError, RoutingError
from muonscale.optim.groups import parameter_groups, routing_report
from muonscale.optim.matrices import Matrices

Build = Callable[[str], nn.Module]


def by_name(groups: list[dict]) -> dict[str, dict]:
    return {group["name"]: group for group in groups}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3"])
def test_groups_partition_the_trainable_parameters(kind: str, build_lm: Build) -> None:
    model = build_lm(kind)
    groups = parameter_groups(model, lr=1e-3)
    routed = [id(p) for group in groups for p in group["params"]]
    assert sorted(routed) == sorted(id(p) for p in model.parameters())
    assert len({group["role"] for group in groups}) == len(groups)


def test_hidden_matrices_and_routers_are_on_muon(build_lm: Build) -> None:
    groups = by_name(parameter_groups(build_lm("mixtral"), lr=1e-3, weight_decay=0.0))
    assert {name: group["rule"] for name, group in groups.items()} == {
        "hidden": "muon",
        "router": "muon",
        "embedding": "adamw",
        "head": "adamw",
        "norm": "adamw",
    }
    assert all(group["lr"] == 1e-3 and group["weight_decay"] == 0.0 for group in groups.values())
    assert set(groups["hidden"]["matrices"]) == set(groups["hidden"]["param_names"])
    assert groups["norm"]["matrices"] == {}


def test_frozen_parameters_are_left_out(toy: nn.Module) -> None:
    toy.get_submodule("up").requires_grad_(False)
    names = [n for g in parameter_groups(toy, lr=1e-3) for n in g["param_names"]]
    assert "up.weight" not in names
    assert "down.weight" in names


def test_overrides_by_role_and_glob(toy: nn.Module) -> None:
    overrides = {"first.*": {"weight_decay": 0.0}, "head": {"lr": 5e-4}, "hidden": {"lr": 2e-3}}
    groups = by_name(parameter_groups(toy, lr=1e-3, overrides=overrides))
    assert groups["head"]["lr"] == 5e-4
    assert groups["hidden"]["lr"] == 2e-3
    assert groups["hidden/first.*"]["param_names"] == ["first.weight"]
    # the role's option stays under the glob's, whichever was written first
    assert groups["hidden/first.*"]["lr"] == 2e-3
    assert groups["hidden/first.*"]["weight_decay"] == 0.0
    assert groups["norm/first.*"]["param_names"] == ["first.bias"]


def test_globs_are_anchored(toy: nn.Module) -> None:
    with pytest.raises(RoutingError, match="matches no trainable parameter"):
        parameter_groups(toy, lr=1e-3, overrides={"irst.weight": {"lr": 1.0}})


def test_a_glob_finds_a_tied_weight_under_each_of_its_names(build_lm: Build) -> None:
    overrides = {"lm_head.weight": {"lr": 5e-4}}
    groups = by_name(parameter_groups(build_lm("gpt2"), lr=1e-3, overrides=overrides))
    assert groups["embedding/lm_head.weight"]["param_names"] == ["transformer.wte.weight"]


def test_a_pattern_without_a_match_names_the_nearest(toy: nn.Module) -> None:
    with pytest.raises(RoutingError, match=r"first\.weight"):
        parameter_groups(toy, lr=1e-3, overrides={"frist.weight": {"lr": 1.0}})
    with pytest.raises(RoutingError, match="roles here are"):
        parameter_groups(toy, lr=1e-3, overrides={"convolution": {"lr": 1.0}})


def test_roles_and_matrices_can_be_overridden(toy: nn.Module) -> None:
    overrides = {
        "second.weight": {"role": "head"},
        "up.weight": {"matrices": Matrices(splits=(8, 8, 8))},
        "out.weight": {"rule": "muon", "rms": 0.1},
    }
    groups = parameter_groups(toy, lr=1e-3, overrides=overrides)
    report = {row.name: row for row in routing_report(groups).rows}
    assert (report["second.weight"].role, report["second.weight"].rule) == ("head", "adamw")
    assert report["up.weight"].matrices == 3
    assert (report["out.weight"].role, report["out.weight"].rule) == ("head", "muon")
    assert "override" in report["out.weight"].why
    assert by_name(groups)["head/out.weight"]["rms"] == 0.1


@pytest.mark.parametrize("name", ["norm", "first.bias"])
def test_muon_on_something_that_is_no_matrix_is_refused(toy: nn.Module, name: str) -> None:
    with pytest.raises(RoutingError, match="no matrix"):
        parameter_groups(toy, lr=1e-3, overrides={name: {"rule": "muon"}})


@pytest.mark.parametrize(
    "options", [{"learning_rate": 1.0}, {"rule": "sgd"}, {"role": "hiden"}, {"lrs": 0.0}]
)
def test_unknown_options_are_refused(toy: nn.Module, options: dict) -> None:
    with pytest.raises(ConfigError):
        parameter_groups(toy, lr=1e-3, overrides={"hidden": options})


def test_no_matrix_on_muon_is_an_error_unless_adamw_was_asked_for() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4))
    with pytest.raises(RoutingError, match="none of the 3"):
        parameter_groups(model, lr=1e-3)
    assert {g["rule"] for g in parameter_groups(model, lr=1e-3, rule="adamw")} == {"adamw"}


def test_adamw_everywhere_means_everywhere(toy: nn.Module) -> None:
    overrides = {"out.weight": {"role": "hidden"}}
    groups = parameter_groups(toy, lr=1e-3, rule="adamw", overrides=overrides)
    assert {group["rule"] for group in groups} == {"adamw"}


def test_the_meta_device_gives_the_same_routing(build_lm: Build) -> None:
    expected = routing_report(parameter_groups(build_lm("deepseek_v3"), lr=1e-3))
    with torch.device("meta"):
        model = build_lm("deepseek_v3")
    assert routing_report(parameter_groups(model, lr=1e-3)) == expected


def test_the_report_adds_up(build_lm: Build) -> None:
    model = build_lm("gpt2")
    report = routing_report(parameter_groups(model, lr=1e-3))
    total = sum(p.numel() for p in model.parameters())
    assert report.muon_matrices == 12
    assert report.parameters() == total
    assert report.parameters("muon") == 2 * 12 * 16 * 16
    assert report.share("muon") + report.share("adamw") == pytest.approx(1)
    assert "12 matrices" in report.summary()
    assert len(report.summary().splitlines()) == 2
    lines = report.table().splitlines()
    assert len(lines) == 1 + len(report.rows)
    row = next(line for line in lines if "h.0.attn.c_attn.weight" in line)
    assert row.split()[1:5] == ["16x48", "3", "hidden", "muon"]
