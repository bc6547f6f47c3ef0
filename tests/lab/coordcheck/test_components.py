"""What parts of models are called."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import nn
from transformers import PreTrainedConfig

from muonscale.lab.config.sections import ModelSection
from muonscale.lab.coordcheck.components import by_place, falling_outputs, part_namer
from muonscale.lab.coordcheck.verdict import PARTS
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.config import model_config
from muonscale.lab.models.widen import fields_at
from muonscale.optim.parameters.roles import assign_roles

EXPECTED = {
    "moonlight-nano": {
        "model.embed_tokens.weight": "embedding",
        "model.layers.1.self_attn.kv_b_proj.weight": "attention",
        "model.layers.0.mlp.gate_proj.weight": "feed-forward",
        "model.layers.1.mlp.gate.weight": "router",
        "model.layers.1.mlp.experts.down_proj": "experts",
        "model.layers.1.mlp.shared_experts.up_proj.weight": "shared experts",
        "model.layers.1.self_attn.kv_a_layernorm.weight": "gains and biases",
        "lm_head.weight": "head",
    },
    "gpt-nano": {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "embedding",
        "transformer.h.0.attn.c_attn.weight": "attention",
        "transformer.h.0.mlp.c_proj.weight": "feed-forward",
        "transformer.h.0.attn.c_attn.bias": "gains and biases",
    },
}


def shape_of(preset: str, **fields: Any) -> PreTrainedConfig:
    section = ModelSection(preset=preset, fields=fields)
    return model_config(section, vocab_size=300, sequence_length=32, bos_id=0, eos_id=0)


def widened(preset: str, width: int) -> nn.Module:
    return meta_model(shape_of(preset, **fields_at(shape_of(preset), width)))


@pytest.mark.parametrize("preset", EXPECTED)
def test_parts_are_distinguished_and_known_to_the_verdict(preset: str) -> None:
    model = meta_model(shape_of(preset))
    name = part_namer(model)
    found = {a.name: name(a) for a in assign_roles(model)}
    assert {key: found[key] for key in EXPECTED[preset]} == EXPECTED[preset]
    assert set(found.values()) <= set(PARTS)


def test_outputs_fall_where_out_over_in_does() -> None:
    narrow, wide = (widened("moonlight-nano", width) for width in (32, 256))
    falls = falling_outputs(narrow, wide, 8)
    for place in ("model.layers.*.mlp.gate", "model.layers.*.mlp.gate.weight", "lm_head.weight"):
        assert falls[place] == pytest.approx(0.5)
    assert falls["logits"] == pytest.approx(0.5)
    # a latent vector with a key of fixed size: 16 + 16 rows at width 32, 128 + 16 at 256
    latent = math.log((32 / 32) / (144 / 256)) / math.log(8) / 2
    assert falls["model.layers.*.self_attn.kv_a_proj_with_mqa"] == pytest.approx(latent)
    flat = {place for place, fall in falls.items() if fall == pytest.approx(0)}
    assert {"model.layers.*.mlp.experts", "model.layers.*.self_attn.o_proj"} <= flat
    assert "model.embed_tokens" not in falls


def test_a_tied_head_falls_and_its_table_does_not() -> None:
    narrow, wide = (widened("gpt-nano", width) for width in (32, 256))
    falls = falling_outputs(narrow, wide, 8)
    assert falls["logits"] == pytest.approx(0.5) and "transformer.wte.weight" not in falls
    rules = {a.name: "adamw" if "wte" in a.name else "muon" for a in assign_roles(wide)}
    places = by_place(wide, rules)
    assert places["logits"] == places["transformer.wte"] == "adamw"
    assert places["transformer.h.*.attn.c_attn"] == "muon"
