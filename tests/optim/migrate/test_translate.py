"""Arguments of other optimizers: every one is in the table, and what they become does the same."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import muonscale
from benchmarks.peers import torch_muon_in_float32
from muonscale import Muon, translate_arguments
from muonscale.errors import ConfigError
from muonscale.optim.migrate.aliases import FOREIGN, NO_COUNTERPART
from muonscale.optim.migrate.aliases.argument import REQUIRED
from muonscale.optim.migrate.translate import find_renames
from muonscale.optim.newton_schulz.coefficients import SCHEDULES, resolve
from tests.optim.compare import close
from tests.optim.signatures import SIGNATURES

HOMES = {
    "torch": "torch.optim:Muon",
    "torch_adamw": "torch.optim:AdamW",
    "keller": "muon:SingleDeviceMuon",
    "pytorch_optimizer": "pytorch_optimizer:Muon",
    "pytorch_optimizer_normuon": "pytorch_optimizer:NorMuon",
}
"""Classes that can be imported."""


def peer(source: str) -> Any:
    module, _, name = HOMES[source].partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("source", SIGNATURES)
def test_every_argument_is_in_the_table_with_its_default(source: str) -> None:
    rows = FOREIGN[source].arguments
    defaults = {name: row.default for name, row in rows.items()}
    assert defaults == SIGNATURES[source]


def test_no_row_is_without_a_signature_that_was_read() -> None:
    assert set(FOREIGN) - set(SIGNATURES) == {"keller_adam"}  # a group, not a class
    assert not set(FOREIGN) & set(NO_COUNTERPART)


@pytest.mark.parametrize("source", HOMES)
def test_the_arguments_are_those_of_the_installed_class(source: str) -> None:
    signature = inspect.signature(peer(source))
    found = {
        name: REQUIRED if parameter.default is parameter.empty else parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind != parameter.VAR_KEYWORD
    }
    assert found == SIGNATURES[source]


@pytest.mark.parametrize("source", FOREIGN)
def test_options_are_those_of_muon(source: str) -> None:
    known = set(inspect.signature(Muon).parameters)
    given = {"learning_rate": 0.02} if source == "optax" else {}
    found = translate_arguments(source, **given)
    assert set(found.muon) <= known
    assert {"lr", "weight_decay"} <= set(found.muon)
    assert set(found.adamw) <= {"lr", "weight_decay"}
    Muon([nn.Parameter(torch.ones(3, 4))], **found.muon)
    for row in FOREIGN[source].arguments.values():
        assert set(filter(None, row.ours.split(", "))) <= known


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": ("torch", {}),
    "torch, options": (
        "torch",
        {
            "lr": 0.1,
            "weight_decay": 0.3,
            "momentum": 0.8,
            "nesterov": False,
            "ns_coefficients": (2.0, -1.5, 0.5),
            "ns_steps": 4,
            "adjust_lr_fn": "match_rms_adamw",
        },
    ),
    "torch, original": ("torch", {"lr": 0.1, "adjust_lr_fn": "original"}),
    "keller": ("keller", {"weight_decay": 0.2}),
    "pytorch_optimizer": ("pytorch_optimizer", {"use_adjusted_lr": True, "ns_coeffs": "quintic"}),
    "pytorch_optimizer, gram": (
        "pytorch_optimizer",
        {"ns_method": "gram_newton_schulz", "nesterov": False, "weight_decay": 0.4},
    ),
    "pytorch_optimizer_normuon": ("pytorch_optimizer_normuon", {"beta2": 0.9}),
    "pytorch_optimizer_normuon, rms": (
        "pytorch_optimizer_normuon",
        {"update_scale": "match_rms", "momentum": 0.9},
    ),
}


@pytest.fixture
def others_in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Others write `X.bfloat16()` or a dtype that their optimizer never passes."""
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        base = importlib.import_module("pytorch_optimizer.optimizer.muon.base")
        normuon = importlib.import_module("pytorch_optimizer.optimizer.muon.normuon")
        for module, name in [
            (base, "zero_power_via_newton_schulz_5"),
            (base, "zero_power_via_gram_newton_schulz"),
            (normuon, "zero_power_via_newton_schulz_5"),
        ]:
            original = getattr(module, name)
            monkeypatch.setattr(module, name, in_float32(original))
    with torch_muon_in_float32():
        yield


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: function(*args, **{**options, "dtype": torch.float32})


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_those_of_the_other_optimizer(case: str, others_in_float32: None) -> None:
    source, arguments = CASES[case]
    build = peer(source)
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(12, 5)), nn.Parameter(torch.randn(5, 12))]
    mine = copy.deepcopy(theirs)
    params: Any = theirs
    if source.startswith("pytorch_optimizer"):
        params = [{"params": theirs, "use_muon": True}]
    other = build(params, **arguments)
    ours = Muon(mine, **(dict(translate_arguments(source, **arguments).muon)))
    for _ in range(3):
        for left, right in zip(theirs, mine, strict=True):
            right.grad = torch.randn(left.shape)
            left.grad = right.grad.clone()
        other.step()
        ours.step()
    for left, right in zip(theirs, mine, strict=True):
        close(right.detach(), left.detach(), 2e-5)


def test_the_defaults_of_torch_are_not_ours() -> None:
    torch_s = translate_arguments("torch").muon
    assert torch_s["scale"] == "keller"
    assert inspect.signature(Muon).parameters["scale"].default == "rms"
    assert translate_arguments("keller").muon["weight_decay"] == 0.0


def test_numbers_of_others_come_out_as_in_their_formulas() -> None:
    nvidia = translate_arguments("nvidia", extra_scale_factor=0.2, num_ns_steps=7).muon
    assert (nvidia["scale"], nvidia["rms"], nvidia["ns_dtype"]) == ("rms", 0.2, "bfloat16")
    first, second = (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377)
    assert nvidia["ns_coefficients"][5:] == (first, second)  # begun anew after the fifth
    dion = translate_arguments("dion", adjust_lr="rms_norm").muon
    assert dion["ns_coefficients"].margin == 1.02 and dion["rms"] == 0.2 and not dion["nesterov"]
    assert translate_arguments("dion", use_polar_express=False).muon["ns_coefficients"] == "you5"
    gram = translate_arguments("dion", use_gram_newton_schulz=True).muon
    assert (gram["ns_form"], gram["ns_coefficients"]) == ("gram", "gram_ns")
    optax = translate_arguments("optax", learning_rate=0.1, adam_b1=0.8, consistent_rms=0.3)
    assert optax.muon["betas"] == (0.8, 0.999) and optax.muon["rms"] == 0.3
    assert optax.adamw == {"weight_decay": 0.0}
    tables = {"learning_rate": 0.1, "ns_steps": 8}
    assert translate_arguments("optax", ns_coeffs="dion", **tables).muon["ns_steps"] == 5
    assert (
        translate_arguments("optax", ns_coeffs=[(2.0, -1.5, 0.5)] * 3, **tables).muon["ns_steps"]
        == 3
    )
    assert translate_arguments("optax", **tables).muon["ns_steps"] == 8
    timm = translate_arguments("timm", lr=0.1, fallback_lr_scale=0.5)
    assert timm.adamw == {"lr": 0.05}
    three = resolve(translate_arguments("timm", ns_steps=3).muon["ns_coefficients"], 3)
    assert three.triples == SCHEDULES["you5"].triples[:3]
    rows = translate_arguments("timm", ns_coefficients=[(2.0, -1.5, 0.5)]).muon
    assert rows["ns_coefficients"] == [(2.0, -1.5, 0.5)]


def test_groups_have_the_rates_of_both_rules(toy: nn.Module) -> None:
    found = translate_arguments("keller_2024", lr=0.02, adamw_lr=3e-4, adamw_wd=0.1)
    overrides = {"head": {"lr": 1e-5}, "up.weight": {"rule": "adamw"}}
    groups = {group["name"]: group for group in found.groups(toy, overrides)}
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {
        "hidden": (0.02, 0.0),
        "hidden/up.weight": (3e-4, 0.1),
        "embedding": (3e-4, 0.1),
        "head": (1e-5, 0.1),
        "norm": (3e-4, 0.1),
    }
    Muon(list(groups.values()), **found.muon)
    given = found.groups(toy, adamw_lr=1e-4, adamw_weight_decay=0.0)
    assert {(g["lr"], g["weight_decay"]) for g in given if g["rule"] == "adamw"} == {(1e-4, 0.0)}
    assert {g["rule"] for g in translate_arguments("torch_adamw").groups(toy)} == {"adamw"}


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("torhc", {}, "'torhc'.*torch"),
        ("torch", {"adjust_lr": None}, "'adjust_lr'.*adjust_lr_fn"),
        ("torch", {"adjust_lr_fn": "rms"}, "adjust_lr_fn is 'rms'; accepted: None, 'original'"),
        ("torch", {"params": [torch.ones(2)]}, "params="),
        ("torch_adamw", {"amsgrad": True}, "amsgrad=True"),
        ("optax", {}, "learning_rate"),
        ("optax", {"learning_rate": 0.1, "preconditioning": "aol"}, "'aol'.*'frobenius'"),
        ("timm", {"ns_coefficients": "polar_express"}, "'polar_express'"),
        (
            "nvidia",
            {"scale_mode": "unit_rms_norm", "extra_scale_factor": 0.2},
            "0.2.*unit_rms_norm",
        ),
        (
            "optax",
            {"learning_rate": 0.1, "ns_steps": 2, "ns_coeffs": "dion"},
            "ns_steps is 2.*5 triples",
        ),
        ("nvidia", {"coefficient_type": "cubic5", "num_ns_steps": 7}, "7.*cubic5"),
        ("nvidia", {"scale_mode": "rms"}, "'rms'.*unit_rms_norm"),
        ("nvidia", {"coefficient_type": "polar_express"}, "'polar_express'.*'simple'"),
        ("nvidia", {"weight_decay_method": "independent"}, "'independent'.*'decoupled'"),
        ("pytorch_optimizer_normuon", {"update_scale": "rms"}, "'rms'.*match_rms"),
        ("pytorch_optimizer", {"weight_decouple": False}, "weight_decouple=False"),
        ("pytorch_optimizer_muonclip", {}, "MuonClip"),
    ],
)
def test_what_cannot_be_translated_is_refused(
    source: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        translate_arguments(source, **arguments)


@pytest.mark.parametrize("source", ["torch", "keller", "normuon", "nvidia"])
def test_what_steps_matrices_alone_says_no_rate_for_the_rest(toy: nn.Module, source: str) -> None:
    found = translate_arguments(source, lr=0.02)
    with pytest.raises(ConfigError, match=r"'embedding'.*adamw_lr"):
        found.groups(toy)
    rates = {group["rule"]: group["lr"] for group in found.groups(toy, adamw_lr=3e-4)}
    assert rates == {"muon": 0.02, "adamw": 3e-4}
    every = {role: {"lr": 1e-4} for role in ("embedding", "head", "norm")}
    assert {g["lr"] for g in found.groups(toy, every)} == {0.02, 1e-4}


def test_saved_groups_are_read_by_the_same_table() -> None:
    muon = find_renames("torch", "keller", "keller_2024", "moonlight", "normuon")
    assert muon["wd"] == "weight_decay" and muon["beta2"] == "normuon_beta2"
    assert "eps" not in muon and "adjust_lr_fn" not in muon  # eps is Newton-Schulz's there
    assert find_renames("torch_adamw", "keller_adam")["eps"] == "eps"
    assert muonscale.translate_arguments is translate_arguments
