from __future__ import annotations

from typing import Any

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.models.structure import expert_modules
from muonscale.lab.parallel.placements import (
    check_model,
    expert_axis,
    parameter_shardings,
    tensor_styles,
)
from muonscale.lab.parallel.styles import parallel_styles
from muonscale.lab.parallel.topology import parse_layout
from muonscale.optim.matrices.sharding import Cut, Sharding
from tests.optim.conftest import causal_lm


def lm(kind: str) -> Any:
    return causal_lm(kind)


def test_the_styles_of_a_llama_are_those_of_megatron() -> None:
    styles = tensor_styles(lm("llama"))
    layer = {n.removeprefix("model.layers.0."): s for n, s in styles.items() if ".0." in n}
    assert layer == {
        "self_attn.q_proj": "rows",
        "self_attn.k_proj": "rows",
        "self_attn.v_proj": "rows",
        "self_attn.o_proj": "columns",
        "mlp.gate_proj": "rows",
        "mlp.up_proj": "rows",
        "mlp.down_proj": "columns",
    }
    assert styles["model.embed_tokens"] == "embedding" and styles["lm_head"] == "head"


def test_norms_of_heads_get_partial_gradients_and_routed_experts_stay_whole() -> None:
    assert tensor_styles(lm("gemma3"))["model.layers.0.self_attn.q_norm"] == "partial"
    assert not any("experts" in name.split(".") for name in tensor_styles(lm("deepseek_v3")))


@pytest.mark.parametrize(
    ("kind", "layout", "reason"),
    [
        ("gpt2", "tp=2", "no tensor-parallel plan for model_type 'gpt2'"),
        ("llama", "tp=4", "4 does not divide num_attention_heads=2"),
        ("llama", "fsdp=2,ep=2", "'llama' has no routed experts"),
        ("mixtral", "fsdp=8,ep=8", "8 does not divide 4 experts"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(kind: str, layout: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_model(lm(kind), parse_layout(layout))


def test_a_sequence_is_not_divided_where_a_layer_would_not_know() -> None:
    with pytest.raises(ConfigError, match=r"leaves out model.layers.0.self_attn"):
        parallel_styles(lm("deepseek_v3"), sequence=True)


def test_experts_that_ranks_cannot_share_are_refused() -> None:
    assert expert_axis((4, 24, 8), parse_layout("fsdp=8,ep=2")) == 1
    assert expert_axis((8, 24, 8), parse_layout("fsdp=4,ep=2")) == 0
    with pytest.raises(ConfigError, match="5 ranks share 2 of the experts"):
        expert_axis((4, 24, 8), parse_layout("fsdp=10,ep=2"))


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_stacks_of_experts_are_found_and_routers_are_not(kind: str) -> None:
    names = list(expert_modules(lm(kind)))
    assert names and all(name.endswith("mlp.experts") for name in names)


def test_what_is_not_shared_along_the_tensor_axis_has_twins() -> None:
    model, topology = lm("llama"), parse_layout("fsdp=3,tp=2")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    norm, query = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
    for rank, ranks in ((0, (0, 2, 4)), (5, (1, 3, 5))):
        found = parameter_shardings(model, topology, {}, rank=rank)
        assert found[norm] == Sharding(shapes[norm], mesh=(3,), cuts=(Cut(0),), ranks=ranks)
        assert found[query] == Sharding(
            shapes[query], mesh=(3, 2), cuts=(Cut(0, 2), Cut(0)), ranks=tuple(range(6))
        )


def test_a_width_that_tensor_parallelism_does_not_divide_is_named_with_its_field() -> None:
    config = causal_lm("llama").config
    config.intermediate_size, config.vocab_size = 65, 321
    model = type(causal_lm("llama"))(config)
    for layout in ("tp=2", "fsdp=2,tp=2"):
        with pytest.raises(
            ConfigError, match="2 does not divide intermediate_size 65 rows"
        ) as error:
            parameter_shardings(model, parse_layout(layout), {})
        assert "layers.0.mlp.gate_proj" in str(error.value)
    config.intermediate_size = 64  # a vocabulary of 321 is gathered
    parameter_shardings(type(model)(config), parse_layout("fsdp=2,tp=2"), {})
