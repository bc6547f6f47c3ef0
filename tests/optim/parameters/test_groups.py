from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from muonscale.errors import ConfigError, GroupingError, LayoutError
from muonscale.optim.matrices.spec import MatrixSpec
from muonscale.optim.muon import Muon
from muonscale.optim.options import option_names
from muonscale.optim.parameters.groups import parameter_groups
from muonscale.optim.parameters.report import grouping_report

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
    with pytest.raises(GroupingError, match="matches no trainable parameter"):
        parameter_groups(toy, lr=1e-3, overrides={"irst.weight": {"lr": 1.0}})


def test_a_glob_finds_a_tied_weight_under_each_of_its_names(build_lm: Build) -> None:
    overrides = {"lm_head.weight": {"lr": 5e-4}}
    groups = by_name(parameter_groups(build_lm("gpt2"), lr=1e-3, overrides=overrides))
    assert groups["embedding/lm_head.weight"]["param_names"] == ["transformer.wte.weight"]


def test_a_pattern_without_a_match_names_the_nearest(toy: nn.Module) -> None:
    with pytest.raises(GroupingError, match=r"first\.weight"):
        parameter_groups(toy, lr=1e-3, overrides={"frist.weight": {"lr": 1.0}})
    with pytest.raises(GroupingError, match="roles here are"):
        parameter_groups(toy, lr=1e-3, overrides={"convolution": {"lr": 1.0}})


def test_roles_and_matrices_can_be_overridden(toy: nn.Module) -> None:
    overrides = {
        "second.weight": {"role": "head"},
        "up.weight": {"matrices": MatrixSpec(splits=(8, 8, 8))},
        "out.weight": {"rule": "muon", "rms": 0.1},
    }
    groups = parameter_groups(toy, lr=1e-3, overrides=overrides)
    report = {row.name: row for row in grouping_report(groups).rows}
    assert (report["second.weight"].role, report["second.weight"].rule) == ("head", "adamw")
    assert report["up.weight"].matrices == 3
    assert (report["out.weight"].role, report["out.weight"].rule) == ("head", "muon")
    assert "override" in report["out.weight"].why
    assert by_name(groups)["head/out.weight"]["rms"] == 0.1


@pytest.mark.parametrize("name", ["norm", "first.bias"])
def test_muon_on_something_that_is_no_matrix_is_refused(toy: nn.Module, name: str) -> None:
    with pytest.raises(GroupingError, match="no matrix"):
        parameter_groups(toy, lr=1e-3, overrides={name: {"rule": "muon"}})


@pytest.mark.parametrize(
    "options", [{"learning_rate": 1.0}, {"rule": "sgd"}, {"role": "hiden"}, {"lrs": 0.0}]
)
def test_unknown_options_are_refused(toy: nn.Module, options: dict) -> None:
    with pytest.raises(ConfigError):
        parameter_groups(toy, lr=1e-3, overrides={"hidden": options})


def test_a_stage_with_nothing_for_muon_makes_an_optimizer_and_says_so() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4))
    with pytest.warns(UserWarning, match="none of the 3"):
        optimizer = Muon(parameter_groups(model, lr=0.1))
    before = model[0].weight.detach().clone()
    model(torch.arange(9)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    with pytest.raises(GroupingError, match="none of the 3"):
        parameter_groups(model, lr=1e-3, strict=True)
    assert {g["rule"] for g in parameter_groups(model, lr=1e-3, rule="adamw")} == {"adamw"}


def test_adamw_everywhere_means_everywhere(toy: nn.Module) -> None:
    overrides = {"out.weight": {"role": "hidden"}}
    groups = parameter_groups(toy, lr=1e-3, rule="adamw", overrides=overrides)
    assert {group["rule"] for group in groups} == {"adamw"}


def test_the_meta_device_gives_the_same_routing(build_lm: Build) -> None:
    expected = grouping_report(parameter_groups(build_lm("deepseek_v3"), lr=1e-3))
    with torch.device("meta"):
        model = build_lm("deepseek_v3")
    assert grouping_report(parameter_groups(model, lr=1e-3)) == expected


def test_the_report_adds_up(build_lm: Build) -> None:
    model = build_lm("gpt2")
    report = grouping_report(parameter_groups(model, lr=1e-3))
    total = sum(p.numel() for p in model.parameters())
    assert report.num_matrices == 12
    assert report.parameters() == total
    assert report.parameters("muon") == 2 * 12 * 16 * 16
    assert report.share("muon") + report.share("adamw") == pytest.approx(1)
    assert "12 matrices" in report.summary()
    assert len(report.summary().splitlines()) == 2
    lines = report.table().splitlines()
    assert len(lines) == 1 + len(report.rows)
    row = next(line for line in lines if "h.0.attn.c_attn.weight" in line)
    assert row.split()[1:7] == ["16x48", "3", "of", "16x16", "hidden", "muon"]


def test_a_mapping_changes_fields_of_the_matrices_that_were_found(build_lm: Build) -> None:
    overrides = {
        "*.c_attn.weight": {"matrices": {"heads": 2}},
        "*.attn.c_proj.weight": {"matrices": {"heads": 2, "by_columns": True}},
        "*.c_fc.weight": {"matrices": {"splits": [40, 24]}},
    }
    groups = parameter_groups(build_lm("gpt2"), lr=1e-3, overrides=overrides)
    found = {name: m for group in groups for name, m in group["matrices"].items()}
    assert found["transformer.h.1.attn.c_attn.weight"] == MatrixSpec(
        transposed=True, splits=(16, 16, 16), heads=2
    )
    assert found["transformer.h.1.attn.c_proj.weight"] == MatrixSpec(
        transposed=True, heads=2, by_columns=True
    )
    assert found["transformer.h.1.mlp.c_fc.weight"].splits == (40, 24)
    report = grouping_report(groups)
    holds = {row.name: row.holds for row in report.rows}
    assert holds["transformer.h.0.attn.c_attn.weight"] == ((2, 8, 16),) * 3
    assert holds["transformer.h.0.attn.c_proj.weight"] == ((2, 16, 8),)
    assert (40, 16) in report.matrix_shapes() and (24, 16) in report.matrix_shapes()


@pytest.mark.parametrize(
    ("matrices", "said"),
    [
        ({"head": 2}, "did you mean heads"),
        ({"heads": "2"}, "of type str; accepted: a whole number, or a list"),
        ({"heads": True}, "of type bool; accepted: a whole number"),
        ({"groups": [2]}, "of type list; accepted: a whole number"),
        ({"splits": 24}, "of type int; accepted: a list of whole numbers"),
        ({"splits": [12, 12.0]}, "of type list; accepted: a list of whole"),
        ({"transposed": 1}, "of type int; accepted: true or false"),
        (3, "such as"),
        ("plain", "such as"),
    ],
)
def test_matrices_that_are_none_are_refused(toy: nn.Module, matrices: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parameter_groups(toy, lr=1e-3, overrides={"up.weight": {"matrices": matrices}})


def test_matrices_that_do_not_fit_name_the_parameter(toy: nn.Module) -> None:
    with pytest.raises(LayoutError, match=r"up\.weight.*heads=5"):
        parameter_groups(toy, lr=1e-3, overrides={"up.weight": {"matrices": {"heads": 5}}})


def test_an_override_of_something_frozen_says_so(toy: nn.Module) -> None:
    toy.get_submodule("up").requires_grad_(False)
    with pytest.raises(GroupingError, match=r"up\.weight.*frozen"):
        parameter_groups(toy, lr=1e-3, overrides={"up.*": {"lr": 1.0}})


def test_adamw_groups_also_say_which_matrices_they_hold(toy: nn.Module) -> None:
    groups = by_name(parameter_groups(toy, lr=1e-3, rule="adamw"))
    assert set(groups["hidden"]["matrices"]) == set(groups["hidden"]["param_names"])


def test_every_option_of_a_group_is_an_option_of_the_optimizer(toy: nn.Module) -> None:
    defaults = set(Muon(parameter_groups(toy, lr=1e-3)).defaults)
    assert defaults - option_names() == {"rule", "momentum_convention"}
    assert defaults >= option_names()


def test_a_trainable_parameter_in_no_group_is_refused(toy: nn.Module) -> None:
    groups = parameter_groups(toy, lr=1e-3)
    report = grouping_report(groups, toy)
    assert report == grouping_report(groups)
    first, *others = groups
    with pytest.raises(GroupingError, match=r"first\.weight.*in no group"):
        grouping_report(others, toy)
    with pytest.raises(GroupingError, match=r"first\.weight is in two groups: hidden and hidden"):
        grouping_report([*groups, first], toy)
    with pytest.raises(GroupingError, match=r"hidden has first\.weight"):
        grouping_report(groups, toy.get_submodule("up"))


def test_frozen_parameters_are_reported_where_the_model_is_given(toy: nn.Module) -> None:
    toy.get_submodule("up").requires_grad_(False)
    report = grouping_report(parameter_groups(toy, lr=1e-3), toy)
    (row,) = [row for row in report.rows if row.rule == "frozen"]
    assert (row.name, row.size, row.matrices) == ("up.weight", 192, 0)
    assert "frozen: 192 parameters" in report.summary()
    assert report.parameters() == sum(p.numel() for p in toy.parameters())


def test_the_report_of_an_optimizer_has_the_shape_factors(toy: nn.Module) -> None:
    overrides = {"up.weight": {"matrices": {"splits": (16, 8)}, "scale": "spectral"}}
    groups = parameter_groups(toy, lr=1e-3, overrides=overrides)
    assert all(row.factors == () for row in grouping_report(groups).rows)
    rows = {row.name: row for row in grouping_report(Muon(groups).param_groups).rows}
    assert rows["up.weight"].factors == pytest.approx((2**0.5, 1.0))
    assert rows["down.weight"].factors == pytest.approx((0.2 * 24**0.5,))
    assert rows["norm.weight"].factors == ()
    plus = Muon(parameter_groups(toy, lr=1e-3), post_norm="row")
    rows = {row.name: row for row in grouping_report(plus.param_groups).rows}
    assert rows["up.weight"].factors == pytest.approx((0.2 * 8**0.5,))


def test_layers_that_repeat_are_one_line_of_the_short_table(build_lm: Build) -> None:
    report = grouping_report(parameter_groups(build_lm("deepseek_v3"), lr=1e-3))
    lines = report.table(full=False).splitlines()
    assert len(lines) < len(report.rows)
    (q,) = [line for line in lines if "q_proj" in line]
    assert q.split()[:2] == ["model.layers.{0..1}.self_attn.q_proj.weight", "2x"]
    (experts,) = [line for line in lines if "experts.gate_up_proj" in line]
    assert experts.split()[0] == "model.layers.1.mlp.experts.gate_up_proj"
    assert "8 of 12x16" in experts
    times = [int(line.split()[1][:-1]) for line in lines[1:]]
    assert sum(times) == len(report.rows)
