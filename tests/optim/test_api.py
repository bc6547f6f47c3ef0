"""What people type first, and what it does: nothing is ignored, nothing is silently another value."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from muonscale import Muon, grouping_report, parameter_groups, preset
from muonscale.errors import CheckpointError, ConfigError, GroupingError, MuonscaleError
from muonscale.optim.newton_schulz.coefficients import Coefficients
from muonscale.optim.options import OPTIONS_OF, MuonOptions, RuleOptions, add_options, option_names
from muonscale.optim.rules.adamw import AdamWRule
from muonscale.optim.rules.base import RULES, register
from tests.distributed.made_up_rule import tilt_rule


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 7))


def rates(optimizer: Muon, option: str = "lr") -> dict[str, Any]:
    return {group["name"]: group[option] for group in optimizer.param_groups}


def stepped(optimizer: Muon) -> Muon:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_options_of_the_constructor_reach_every_group_that_was_given_none() -> None:
    groups = parameter_groups(model(), lr=0.02)
    assert set(rates(Muon(groups, **preset("keller")), "weight_decay").values()) == {0.0}
    assert set(rates(Muon(groups, weight_decay=0.3), "weight_decay").values()) == {0.3}
    assert set(rates(Muon(parameter_groups(model()), lr=5e-3)).values()) == {5e-3}
    assert set(rates(Muon(groups, lr=5e-3)).values()) == {0.02}  # given to the groups


def test_a_model_is_enough() -> None:
    net = model()
    optimizer = Muon(net, lr=1e-3, adamw_lr=2e-3)
    assert rates(optimizer) == {"hidden": 1e-3, "embedding": 2e-3, "head": 2e-3, "norm": 2e-3}
    assert stepped(optimizer).stats()["matrices"] == 1
    same = Muon(parameter_groups(net, 1e-3, adamw_lr=2e-3))
    assert rates(same) == rates(optimizer)


@pytest.mark.parametrize("rule", ["muon", "adamw"])
def test_adamw_lr_is_that_of_all_but_hidden_matrices_under_either_rule(rule: Any) -> None:
    overrides = {"norm": {"lr": 3e-3}}
    groups = parameter_groups(model(), 1e-3, adamw_lr=2e-3, rule=rule, overrides=overrides)
    found = {group["name"]: group["lr"] for group in groups}
    assert found == {"hidden": 1e-3, "embedding": 2e-3, "head": 2e-3, "norm": 3e-3}


def test_a_matrix_that_an_override_puts_on_adamw_has_its_rate() -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 7))
    overrides = {"1.weight": {"rule": "adamw"}, "head": {"rule": "muon"}}
    groups = parameter_groups(net, 1e-3, adamw_lr=2e-3, overrides=overrides)
    found = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert found["1.weight"] == 2e-3
    assert found["2.weight"] == found["3.weight"] == 1e-3


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (lambda: model().parameters(), "generator"),
        (lambda: list(model().parameters()), "list"),
        (lambda: None, "NoneType"),
        (lambda: "gpt2", "str"),
    ],
)
def test_what_is_no_model_is_refused(given: Any, named: str) -> None:
    with pytest.raises(GroupingError, match=named):
        parameter_groups(given(), 1e-3)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("weigth_decay", 0.0, "weight_decay"),
        ("use_muon", False, 'rule="adamw"'),
        ("use_muon", True, 'rule="muon"'),
        ("adjust_lr_fn", "match_rms_adamw", "translate_arguments"),
    ],
)
def test_a_key_of_a_group_that_no_option_has_is_refused(key: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Muon([{"params": [nn.Parameter(torch.ones(4, 6))], key: value}])
    assert key in str(refused.value) and named in str(refused.value)


def test_groups_that_a_scheduler_has_written_to_can_be_given_again() -> None:
    optimizer = Muon(model(), lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    again = Muon(optimizer.param_groups)
    assert rates(again) == rates(optimizer)


@pytest.mark.parametrize(
    "overrides", [{"head": "muon"}, {"head": ["muon"]}, ["head"], {"head": {"lr": "1e-3"}}]
)
def test_overrides_of_another_form_are_refused(overrides: Any) -> None:
    with pytest.raises(ConfigError, match="head"):
        parameter_groups(model(), 1e-3, overrides=overrides)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", "1e-3"),
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("lr", True),
        ("weight_decay", None),
        ("adamw_lr", -1.0),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("momentum", "0.9"),
        ("post_norm_eps", 0.0),
    ],
)
def test_numbers_are_refused_where_they_are_given(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        Muon(model(), **{option: value})
    if option in ("lr", "adamw_lr"):
        with pytest.raises(ConfigError, match=option):
            parameter_groups(model(), **{option: value})


def test_our_errors_are_value_errors() -> None:
    assert issubclass(MuonscaleError, ValueError)
    with pytest.raises(ValueError, match="moonlit"):
        preset("moonlit")


def test_a_report_is_made_of_groups_of_an_optimizer_and_of_a_model() -> None:
    net = model()
    optimizer = Muon(net, lr=1e-3)
    reports = [grouping_report(g) for g in (net, parameter_groups(net), optimizer)]
    names = [{(row.name, row.rule) for row in report.rows} for report in reports]
    assert names[0] == names[1] == names[2] and ("1.weight", "muon") in names[0]
    assert reports[0].rows[0].lr is None and reports[2].rows[0].lr == 1e-3
    for row in reports[2].rows:
        assert row.name in str(reports[2])


def test_coefficients_are_saved_so_that_torch_load_needs_no_import(tmp_path: Any) -> None:
    own = Coefficients(
        triples=((2.0, -1.5, 0.5), (1.5, -0.5, 0.0)), normalization="schatten4", margin=1.01
    )
    optimizer = stepped(Muon(model(), ns_coefficients=own, ns_steps=2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    with torch.serialization.safe_globals([]):
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    kinds = {type(group["ns_coefficients"]) for group in state["param_groups"]}
    assert kinds == {tuple}
    other = Muon(model())
    other.load_state_dict(state)
    assert {group["ns_coefficients"] for group in other.param_groups} == {own}


def test_the_state_of_torchs_muon_is_said_to_need_conversion() -> None:
    weight = nn.Parameter(torch.ones(4, 6))
    theirs = {
        "state": {0: {"momentum_buffer": torch.ones(4, 6)}},
        "param_groups": [{"params": [0], "lr": 0.1, "momentum": 0.95, "adjust_lr_fn": None}],
    }
    with pytest.raises(CheckpointError, match="convert_state_dict"):
        Muon([("w", weight)]).load_state_dict(theirs)


def test_the_state_of_normuon_names_the_option_it_needs() -> None:
    saved = stepped(Muon(model(), post_norm="normuon")).state_dict()
    with pytest.raises(CheckpointError, match='post_norm="normuon"'):
        Muon(model()).load_state_dict(saved)


def test_names_are_those_of_the_model_inside_data_parallel() -> None:
    names = [n for g in parameter_groups(nn.DataParallel(model()), 1e-3) for n in g["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model().named_parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=5),
    ],
)
def test_schedulers_that_cycle_momentum_cycle_it_on_both_rules(make: Any) -> None:
    optimizer = Muon(model(), lr=0.01)
    schedule, seen = make(optimizer), []
    for _ in range(8):
        stepped(optimizer)
        groups = {group["name"]: group for group in optimizer.param_groups}
        seen.append(groups["hidden"]["momentum"])
        assert seen[-1] == groups["head"]["betas"][0]
        schedule.step()
    assert len(set(seen)) > 3


@dataclass(frozen=True, kw_only=True)
class Clashing(RuleOptions):
    """Options that a rule cannot have."""

    title: ClassVar[str] = "Clashing"
    betas: tuple[float, float] = (0.5, 0.5)
    """The name of an option of AdamW."""


@dataclass(frozen=True, kw_only=True)
class Unbounded(RuleOptions):
    """Options that a rule cannot have."""

    title: ClassVar[str] = "Unbounded"
    reach: float = field(default=1.0, metadata={"range": "between"})
    """In no known range."""


@pytest.mark.parametrize(("options", "word"), [(Clashing, "betas"), (Unbounded, "between")])
def test_a_rule_whose_options_cannot_be_is_refused(options: type[RuleOptions], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        add_options("refused", options)
    assert "refused" not in OPTIONS_OF
    assert Muon([nn.Parameter(torch.ones(2, 2))]).defaults["betas"] == (0.9, 0.95)


def test_a_rule_whose_stages_contradict_its_options_is_refused() -> None:
    class Stageless(AdamWRule):
        name = "stageless"
        options = MuonOptions  # says on_matrices

    with pytest.raises(ConfigError, match="stageless"):
        register(Stageless())
    assert "stageless" not in RULES


def test_the_rule_checks_its_own_options_in_every_group() -> None:
    with tilt_rule():
        for rule in ("tilt", "adamw"):
            with pytest.raises(ConfigError, match=r"tilt=0\.123"):
                Muon([{"params": [nn.Parameter(torch.ones(2, 2))], "rule": rule, "tilt": 0.123}])


def test_the_signature_has_every_option_and_a_subclass_its_own() -> None:
    class Sub(Muon):
        def __init__(self, params: Any, names: tuple[str, ...] = (), **options: Any) -> None:
            super().__init__(params, **options)

    found = inspect.signature(Muon).parameters
    assert list(found)[:5] == ["params", "lr", "weight_decay", "momentum", "nesterov"]
    assert found.keys() >= option_names()
    assert list(inspect.signature(Sub).parameters) == ["params", "names", "options"]
    assert Sub([nn.Parameter(torch.ones(2, 2))], momentum=0.5).param_groups[0]["momentum"] == 0.5


def test_a_saved_option_that_is_none_now_is_left_out_with_a_warning() -> None:
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))])
    state = optimizer.state_dict()
    state["param_groups"][0]["wire_dtype"] = "bfloat16"
    with pytest.warns(UserWarning, match="wire_dtype"):
        optimizer.load_state_dict(state)
    assert "wire_dtype" not in optimizer.param_groups[0]
