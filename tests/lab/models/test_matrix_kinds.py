from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from muonscale.lab.models.matrix_kinds import KINDS, matrix_kinds
from muonscale.optim.diagnostics.telemetry import measure_kinds, snapshot
from muonscale.optim.muon import Muon
from muonscale.optim.parameters.groups import parameter_groups
from tests.lab.models.logits import build, ids

PATTERNS: dict[str, dict[str, str]] = {
    "llama": {
        "AttnQO": r".*self_attn\.[qo]_proj.weight:0",
        "AttnKV": r".*self_attn\.[kv]_proj.weight:0",
        "Dense": r".*mlp\..*",
    },
    "gemma3": {
        "AttnQO": r".*self_attn\.[qo]_proj.weight:0",
        "AttnKV": r".*self_attn\.[kv]_proj.weight:0",
        "Dense": r".*mlp\..*",
    },
    "gpt2": {
        "AttnQO": r".*attn\.(c_attn.weight:0|c_proj.weight:0)",
        "AttnKV": r".*attn\.c_attn.weight:[12]",
        "Dense": r".*mlp\..*",
    },
    "deepseek_v3_low_rank": {
        "AttnQO": r".*self_attn\.(q_a|q_b|o)_proj.weight:0",
        "AttnKV": r".*self_attn\.(kv_a_proj_with_mqa|kv_b_proj).weight:0",
        "Experts": r".*layers\.1\.mlp\.experts\.(gate_up_proj:[01]|down_proj:0)",
        "SharedExperts": r".*layers\.1\.mlp\.shared_experts\..*",
        "Router": r".*layers\.1\.mlp\.gate\.weight:0",
        "Dense": r".*layers\.0\.mlp\.(gate|up|down)_proj.weight:0",
    },
    "mixtral": {
        "AttnQO": r".*self_attn\.[qo]_proj.weight:0",
        "AttnKV": r".*self_attn\.[kv]_proj.weight:0",
        "Experts": r".*experts\.(gate_up_proj:[01]|down_proj:0)",
        "Router": r".*gate\.weight:0",
    },
    "qwen2_moe": {
        "AttnQO": r".*self_attn\.[qo]_proj.weight:0",
        "AttnKV": r".*self_attn\.[kv]_proj.weight:0",
        "Experts": r".*mlp\.experts\.(gate_up_proj:[01]|down_proj:0)",
        "SharedExperts": r".*mlp\.shared_expert\..*",
        "Router": r".*mlp\.gate\.weight:0",
    },
}
OF_NONE = r".*(embed_tokens|lm_head|wte|wpe|shared_expert_gate).*"


def optimizer_of(model: Any, **options: Any) -> Muon:
    return Muon(parameter_groups(model, lr=1e-2), **options)


@pytest.mark.parametrize("kind", PATTERNS)
def test_every_matrix_is_of_the_kind_that_its_name_says(kind: str) -> None:
    model = build(kind)
    found = matrix_kinds(model, optimizer_of(model).param_groups)
    assert list(found) == [name for name in KINDS if name in PATTERNS[kind]]
    for name, members in found.items():
        for parameter, batch in members:
            assert re.fullmatch(PATTERNS[kind][name], f"{parameter}:{batch}"), (name, parameter)
    placed = [place for members in found.values() for place in members]
    assert len(placed) == len(set(placed))
    named = {parameter for parameter, _ in placed}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not re.fullmatch(OF_NONE, name):
            assert name in named, name


def stepped(kind: str, lr: float = 1e-2) -> tuple[Any, Muon, dict[str, Tensor], dict[str, Tensor]]:
    """Return a model after a step with decay 0, its optimizer, and the weights before and after."""
    model = build(kind, dtype=torch.float32)
    optimizer = optimizer_of(model, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, 0.0
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    before = snapshot(optimizer.param_groups)
    optimizer.step()
    return model, optimizer, before, {n: p.detach() for n, p in model.named_parameters()}


def figures_of(W: Tensor) -> dict[str, float]:
    s = torch.linalg.svdvals(W.double())
    q = s**2 / (s**2).sum()
    entropy = float(-(q * q.log()).sum() / torch.tensor(len(s)).log())
    return {
        "svd_entropy": entropy,
        "stable_rank": float((s**2).sum() / s[0] ** 2),
        "rms": float(W.double().square().mean().sqrt()),
    }


def expert_matrices(stack: Tensor, fused: bool) -> list[Tensor]:
    halves = stack.chunk(2, dim=1) if fused else [stack]
    return [expert for half in halves for expert in half]


@pytest.mark.parametrize("what", ["weight", "update"])
def test_figures_are_means_over_the_matrices_of_a_kind(what: str) -> None:
    model, optimizer, before, after = stepped("deepseek_v3")
    tensors = after if what == "weight" else {n: (before[n] - after[n]) / 1e-2 for n in after}
    kinds = matrix_kinds(model, optimizer.param_groups)
    found = measure_kinds(optimizer.param_groups, before, kinds, matrices=1000)
    experts = "model.layers.1.mlp.experts."
    layers = [f"model.layers.{i}.self_attn." for i in range(2)]
    expected = {
        "AttnQO": [tensors[f"{at}{n}.weight"] for at in layers for n in ("q_proj", "o_proj")],
        "Experts": expert_matrices(tensors[f"{experts}gate_up_proj"], True)
        + expert_matrices(tensors[f"{experts}down_proj"], False),
        "Router": [tensors["model.layers.1.mlp.gate.weight"]],
    }
    for kind, matrices in expected.items():
        assert found[kind]["measured"] == len(matrices)
        each = [figures_of(W) for W in matrices]
        for name in ("svd_entropy", "stable_rank", "rms"):
            mean = sum(figures[name] for figures in each) / len(each)
            assert found[kind][f"{what}_{name}"] == pytest.approx(mean, rel=2e-3), (kind, name)


def test_a_sample_is_spread_over_a_kind_and_none_is_nothing() -> None:
    model, optimizer, before, after = stepped("deepseek_v3")
    kinds = matrix_kinds(model, optimizer.param_groups)
    groups = optimizer.param_groups
    found = measure_kinds(groups, before, kinds, matrices=3)
    assert {figures["measured"] for figures in found.values()} == {3, 1}
    # Of the twelve matrices of four experts: numbers 2, 6 and 10 of gate, up, down.
    experts = "model.layers.1.mlp.experts."
    every = expert_matrices(after[f"{experts}gate_up_proj"], True)
    every += expert_matrices(after[f"{experts}down_proj"], False)
    mean = sum(figures_of(every[i])["rms"] for i in (2, 6, 10)) / 3
    assert found["Experts"]["weight_rms"] == pytest.approx(mean, rel=1e-5)
    assert measure_kinds(groups, before, kinds, matrices=0) == {}


def test_a_step_of_no_length_has_no_figures_of_an_update() -> None:
    model, optimizer, before, _ = stepped("llama", lr=0.0)
    kinds = matrix_kinds(model, optimizer.param_groups)
    for figures in measure_kinds(optimizer.param_groups, before, kinds).values():
        assert not [name for name in figures if name.startswith("update")]
