"""`muonscale bench`: what is stepped, what is counted, what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from muonscale.errors import ConfigError
from muonscale.lab.bench import memory, model, rates
from muonscale.lab.bench.buckets import make_buckets, make_parameters, select_groups
from muonscale.lab.bench.contenders import OURS, TORCH_MUON, spread
from muonscale.lab.bench.model import BenchRequest, Measurement
from muonscale.lab.models.build import meta_model
from muonscale.lab.targets import inspect, resolve_target
from muonscale.lab.training.setup import build_optimizer
from muonscale.optim.newton_schulz.flops import ns_flops
from tests.conftest import Muonscale


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "RATE_SECONDS", 0.0)


def measured(*overrides: str, target: str = "llama-pico", **options: Any) -> dict[str, Any]:
    words = ["optimizer.ns_dtype=float32", "data.vocab_size=300", *overrides]
    given = {"rounds": 2, "threads": 1, **options}
    return model.bench(BenchRequest(target=target, overrides=words, **given))


def test_every_parameter_is_in_one_bucket() -> None:
    rows = inspect("llama-pico").groups.rows
    parts = make_buckets(rows)
    names = [name for part in parts for name in part.names]
    assert sorted(names) == sorted(row.name for row in rows)
    assert all(part.scale == 1 for part in parts)
    assert [part.rule for part in parts].index("adamw") == len(parts) - 1


def test_some_layers_stand_for_all() -> None:
    rows = inspect("llama-nano").groups.rows
    parts = make_buckets(rows, layers=1)
    for part in (part for part in parts if part.rule == "muon"):
        assert all(".0." in name for name in part.names)
        assert part.scale == part.count / len(part.names) == 4
    (rest,) = (part for part in parts if part.rule == "adamw")
    elements = sum(math.prod(row.shape) for row in rows if row.rule == "adamw")
    assert rest.elements * rest.scale == pytest.approx(elements)


def test_the_optimizer_is_the_configured_one() -> None:
    words = ["optimizer.lr=0.02", "optimizer.post_norm=row", "transfer.base={hidden_size: 32}"]
    config, shape = resolve_target("llama-pico", words[:2])
    whole = meta_model(shape)
    groups = build_optimizer(whole, config.optimizer).param_groups
    shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    parameters = make_parameters(shapes, torch.device("cpu"))
    ours = model.Muon(select_groups(groups, parameters))
    for before, after in zip(groups, ours.param_groups, strict=True):
        assert {k: v for k, v in after.items() if k != "params"} == {
            k: v for k, v in before.items() if k != "params"
        }
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())


def test_what_is_measured_of_a_small_model() -> None:
    found = measured("train.batch_tokens=256", "data.sequence_length=32", "eval.batch_tokens=32")
    rows = inspect("llama-pico", ["data.vocab_size=300"]).groups.rows
    for part in found["parts"]:
        ours, adamw = part["sides"][OURS], part["sides"]["torch.optim.AdamW"]
        here = [r for r in rows if r.rule == part["rule"]]
        if part["rule"] == "muon":
            here = [r for r in here if "x".join(map(str, r.shape)) == part["title"]]
            flops = sum(n * ns_flops((o, i)) for r in here for n, o, i in r.holds)
            assert part["newton_schulz_flops"] == flops
            assert ours["state_bytes"] == 4 * sum(r.size for r in here)
            assert part["sides"][TORCH_MUON]["state_bytes"] == ours["state_bytes"]
        assert adamw["state_bytes"] == 8 * sum(r.size for r in here) + 4 * len(here)
        assert ours["extra_bytes"] > 0
        assert ours["seconds"]["low"] <= ours["seconds"]["median"] <= ours["seconds"]["high"]
    step = found["whole"][OURS]["seconds"]["median"]
    passes = found["passes"]["seconds"]["median"] * 256 / found["passes"]["micro_tokens"]
    assert found["share"][OURS] == pytest.approx(step / (step + passes))


@pytest.mark.slow
def test_layers_and_tokens_are_extrapolated() -> None:
    words = ("data.sequence_length=32", "eval.batch_tokens=32", "train.batch_tokens=64")
    found = measured(*words, target="llama-nano", layers=1, tokens=6400)
    sums = found["sum_of_parts"][OURS]
    parts = found["parts"]
    wanted = sum(part["sides"][OURS]["seconds"]["median"] * part["scale"] for part in parts)
    assert (found["whole"], sums) == (None, pytest.approx(wanted))
    passes = found["passes"]["seconds"]["median"] * 6400 / found["passes"]["micro_tokens"]
    assert found["share"][OURS] == pytest.approx(sums / (sums + passes))


@pytest.mark.slow
def test_stacks_of_experts_are_not_for_torch() -> None:
    found = measured("data.sequence_length=32", target="moonlight-nano", layers=1, passes=False)
    reasons = {len(part["title"].split("x")): part["no_torch_muon"] for part in found["parts"]}
    assert reasons[3] == "it takes 2-D parameters alone"
    assert reasons[2] is None
    assert found["passes"] == {"not_measured": "--no-model"}


def test_what_does_not_fit_is_refused_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "make_parameters", lambda *_: pytest.fail("something was allocated"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 * 2**30)
    with pytest.raises(ConfigError, match=r"needs about [\d.]+ GiB, and 10\.00 GiB .*--layers 1"):
        measured(target="moonlight-16b-a3b")


def test_passes_that_do_not_fit_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "free_bytes", lambda device: 1000)
    found = measured("data.sequence_length=32", rounds=1, layers=1)
    assert "1000 B are free" in found["passes"]["not_measured"]


def test_the_needs_are_those_that_were_measured() -> None:
    words = ["data.vocab_size=300", "optimizer.ns_dtype=float32"]
    ready = Measurement(BenchRequest(target="llama-nano", overrides=words))
    found = model.bench(BenchRequest(target="llama-nano", overrides=words, rounds=1, passes=False))
    elements = found["parameters"]
    whole = found["whole"]
    sides = sum(side["state_bytes"] for side in whole.values())
    real = 2 * 4 * elements + sides + max(side["extra_bytes"] for side in whole.values())
    assert real <= ready.bytes_needed(None) <= 1.3 * real


def test_a_single_value_is_its_own_spread() -> None:
    assert spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--layers", "0"], "--layers 0: at least 1"),
        (["--tokens", "33", "data.sequence_length=32"], "--tokens 33 is not a multiple of"),
        (["optimizer.lrr=1"], "unknown key optimizer.lrr"),
    ],
)
def test_what_cannot_be_is_refused(muonscale: Muonscale, words: list[str], said: str) -> None:
    answer = muonscale("bench", "llama-pico", *words)
    assert answer.code == 2
    assert said in answer.err


@pytest.mark.slow
def test_the_command_prints_tables_or_json(muonscale: Muonscale) -> None:
    words = ("bench", "llama-pico", "data.vocab_size=300", "data.sequence_length=32", "--rounds=1")
    text = muonscale(*words, "--threads=1").out
    assert "whole model" in text
    assert "of a training step of 32 tokens" in text
    facts = json.loads(muonscale(*words, "--threads=1", "--json", "--no-model").out)
    assert facts["parameters"] == inspect("llama-pico", [words[2]]).size.total
