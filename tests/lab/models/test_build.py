from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muonscale.errors import ConfigError
from muonscale.lab.config.sections import ModelSection
from muonscale.lab.models.build import build_model, meta_model
from muonscale.lab.models.config import model_config
from muonscale.lab.models.flops import active_parameters, flops_per_token
from muonscale.lab.models.structure import count_parameters

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 32000,
}
MOONLIGHT = Path(__file__).parents[2] / "fixtures" / "moonlight-16b"
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}


def resolve(preset: str | None = "llama-pico", vocab_size: int = 100, **section: Any):
    if "config" in section:
        preset = None
    return model_config(
        ModelSection(preset=preset, **section),
        vocab_size=vocab_size,
        sequence_length=48,
        bos_id=None,
        eos_id=3,
    )


def written(folder: Path, tree: object) -> Path:
    path = folder / "config.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return path


def llama_body(hidden: int, layers: int, key_value: int, intermediate: int) -> int:
    attention = 2 * hidden * hidden + 2 * hidden * key_value
    return layers * (attention + 3 * hidden * intermediate + 2 * hidden) + hidden


def test_presets_have_the_parameters_of_the_formula():
    for name, shape in {
        "llama-nano": (128, 4, 128, 352),
        "llama-pico": (32, 2, 16, 88),
    }.items():
        count = count_parameters(build_model(resolve(name, vocab_size=1024), seed=0))
        assert count.without_embeddings == llama_body(*shape)
        assert count.total == llama_body(*shape) + 2 * 1024 * shape[0]


def test_a_tied_embedding_counts_once():
    count = count_parameters(build_model(resolve(fields={"tie_word_embeddings": True}), seed=0))
    assert count.without_embeddings == llama_body(32, 2, 16, 88)
    assert count.total == llama_body(32, 2, 16, 88) + 100 * 32


def test_position_embeddings_are_no_body(tmp_path: Path):
    count = count_parameters(meta_model(resolve(config=written(tmp_path, GPT2))))
    layer = 12 * 16 * 16 + 13 * 16  # four matrices' worth of attention, eight of MLP, their biases
    assert count.without_embeddings == layer + 2 * 16
    assert count.total == count.without_embeddings + (100 + 64) * 16


def test_vocabulary_tokens_and_positions_follow_the_data(tmp_path: Path):
    source = {**LLAMA, "max_position_embeddings": 16, "pad_token_id": 31999, "eos_token_id": 2}
    for config in (resolve(), resolve(config=written(tmp_path, source))):
        assert config.vocab_size == 100
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 3, None)
        assert config.max_position_embeddings == 48


def test_more_positions_than_a_sequence_are_kept(tmp_path: Path):
    path = written(tmp_path, {**LLAMA, "max_position_embeddings": 512})
    assert resolve(config=path).max_position_embeddings == 512
    assert resolve(fields={"max_position_embeddings": 96}).max_position_embeddings == 96


def test_a_folder_is_read_like_its_config_file(tmp_path: Path):
    path = written(tmp_path, {**LLAMA, "rms_norm_eps": 1e-3})
    assert resolve(config=path) == resolve(config=tmp_path)
    assert resolve(config=tmp_path).rms_norm_eps == 1e-3


def test_fields_win_over_the_source_under_any_of_their_names(tmp_path: Path):
    path = written(tmp_path, GPT2)
    assert resolve(config=path, fields={"hidden_size": 32}).n_embd == 32
    assert resolve(config=path, fields={"n_embd": 32}).hidden_size == 32
    assert resolve(config=path).hidden_size == 16


@pytest.mark.parametrize(
    "source",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5e5},
    ],
)
def test_rotary_fields_win_over_either_spelling_of_the_source(tmp_path: Path, source: dict):
    path = written(tmp_path, {**LLAMA, **source})
    assert resolve(config=path).rope_parameters["rope_theta"] == 5e5
    changed = resolve(config=path, fields={"rope_theta": 7e3}).rope_parameters
    assert changed["rope_theta"] == 7e3
    assert changed.get("factor") == source.get("rope_scaling", {}).get("factor")
    whole = {"rope_type": "linear", "factor": 2.0, "rope_theta": 9e3}
    assert resolve(config=path, fields={"rope_parameters": whole}).rope_parameters == whole


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"preset": "llama-nanno"}, "did you mean llama-nano"),
        ({"fields": {"hiden_size": 8}}, "model.fields.hiden_size.*did you mean hidden_size"),
        ({"fields": {"vocab_size": 8}}, "vocab_size cannot be set: the tokenizer"),
        ({"fields": {"dtype": "bfloat16"}}, "unknown field model.fields.dtype"),
        ({"fields": {"hidden_size": "big"}}, "hidden_size.*expected int, got str"),
        ({"fields": {"hidden_size": 30}}, "30.*not a multiple"),
        ({"fields": {"max_position_embeddings": 16}}, "16 positions are fewer.*length=48"),
        (
            {"fields": {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}},
            "put rope_theta inside rope_parameters",
        ),
    ],
)
def test_what_a_section_cannot_say_is_refused(section: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        resolve(**section)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("{", r"config.json cannot be read"),
        ([1], r"config.json holds \[1\]"),
        ({"hidden_size": 8}, "no model_type"),
        ({"model_type": "vit"}, "'vit' is not a causal language model"),
        ({"model_type": "lama"}, "did you mean llama"),
        ({"model_type": "bert"}, "'bert' is not a causal language model: it attends"),
        ({"model_type": "xlnet"}, "it attends to later tokens"),
        ({"model_type": "gemma3"}, "text-only type, gemma3_text"),
    ],
)
def test_a_config_file_that_is_not_of_a_causal_model_is_refused(
    tmp_path: Path, tree: object, message: str
):
    with pytest.raises(ConfigError, match=message):
        resolve(config=written(tmp_path, tree))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 3}, "heads=3"),
        ({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 8}, "heads=8"),
        ({"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 5}, "tok=5"),
    ],
)
def test_counts_that_fail_at_the_first_pass_are_refused(tmp_path: Path, tree: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        resolve(config=written(tmp_path, {**tree, "hidden_size": 32}))


def test_a_missing_config_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there is no .*config.json"):
        resolve(config=tmp_path)


def test_gpt_neox_is_causal_whatever_its_is_decoder_says(tmp_path: Path):
    assert resolve(config=written(tmp_path, {"model_type": "gpt_neox"})).is_decoder is False


def test_one_rotary_base_for_two_kinds_of_layers_is_refused(tmp_path: Path):
    path = written(tmp_path, {"model_type": "gemma3_text"})
    with pytest.raises(ConfigError, match=r"give model.fields.rope_parameters, now.*1000000"):
        resolve(config=path, fields={"rope_theta": 1e4})


def test_a_value_that_only_the_model_refuses_is_a_sentence():
    config = resolve(fields={"hidden_act": "no-such-function"})
    for build in (meta_model, lambda config: build_model(config, seed=0)):
        with pytest.raises(ConfigError, match=r"cannot build a llama model.*no-such-function"):
            build(config)


def test_a_seed_decides_the_weights():
    config = resolve()
    first, again, other = (build_model(config, seed=seed) for seed in (5, 5, 6))
    for (name, p), q in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_building_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    build_model(resolve(), seed=5)
    meta_model(resolve())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_a_model_is_float32_with_sdpa_and_no_cache(tmp_path: Path):
    config = resolve(config=written(tmp_path, {**LLAMA, "torch_dtype": "bfloat16"}))
    model = build_model(config, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache is False
    assert model(torch.zeros(1, 4, dtype=torch.int64)).past_key_values is None
    assert config.use_cache is True  # the caller's configuration is not touched


def test_the_meta_model_has_the_shapes_of_the_model():
    config = resolve()
    real, meta = build_model(config, seed=0), meta_model(config)
    shapes = {name: p.shape for name, p in real.named_parameters()}
    assert {name: p.shape for name, p in meta.named_parameters()} == shapes
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert count_parameters(meta) == count_parameters(real)


def test_flops_follow_the_formula():
    config = resolve()
    attention = 12 * 2 * 4 * 8 * 48
    body = llama_body(32, 2, 16, 88)
    assert flops_per_token(config, meta_model(config), 48) == 6 * (body + 3200) + attention
    tied = resolve(fields={"tie_word_embeddings": True})
    assert flops_per_token(tied, meta_model(tied), 48) == 6 * (body + 3200) + attention


def test_flops_of_gpt2_count_its_fused_matrices(tmp_path: Path):
    tree = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 77}
    config = resolve(config=written(tmp_path, tree))
    # per layer qkv, projection and a feed-forward of four widths, with biases, and two norms
    layer = (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16) + 2 * 32
    head = 100 * 16  # tied, and the final norm
    attention = 12 * 2 * 16 * 48
    assert flops_per_token(config, meta_model(config), 48) == (
        6 * (2 * layer + 32 + head) + attention
    )


def test_flops_of_a_mixture_count_the_experts_a_token_meets(tmp_path: Path):
    source = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_key_value_heads": 4}
    source |= {"num_experts_per_tok": 3}
    config = resolve(config=written(tmp_path, source))
    model = meta_model(config)
    width, inner = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    attention = 4 * width * width  # as many heads of keys and values as of queries
    layer = attention + 3 * 3 * width * inner + 4 * width + 2 * width
    body = LLAMA["num_hidden_layers"] * layer + width
    assert active_parameters(config, model) == body
    scores = 12 * LLAMA["num_hidden_layers"] * width * 48
    assert flops_per_token(config, model, 48) == 6 * (body + 100 * width) + scores


def test_moonlight_activates_the_published_number_of_parameters():
    config = resolve(config=MOONLIGHT, vocab_size=163840)
    model = meta_model(config)
    # Liu et al., arXiv 2502.16982, table 3: 2.24B activated, embeddings not counted
    active = active_parameters(config, model)
    assert active is not None and round(active / 1e9, 2) == 2.24
    attention = 2048 * 3072 + 2048 * 576 + 512 * 4096 + 2048 * 2048 + 512
    mixture = 64 * 2048 + 3 * 2048 * 2816 + 6 * 3 * 2048 * 1408
    norms = 27 * 2 * 2048 + 2048
    assert active == 27 * attention + 3 * 2048 * 11264 + 26 * mixture + norms
    # latent attention: queries and keys have 128 + 64, values 128 per head
    scores = 6 * 27 * 16 * (192 + 128) * 8192
    expected = 6 * (active + 163840 * 2048) + scores
    assert flops_per_token(config, model, 8192) == expected


def test_flops_of_a_mixture_that_says_nothing_of_its_experts_are_not_claimed(tmp_path: Path):
    config = resolve(config=MOONLIGHT, vocab_size=300, fields={"num_hidden_layers": 2})
    model = meta_model(config)
    assert flops_per_token(config, model, 48) is not None
    config.num_experts_per_tok = None
    assert flops_per_token(config, model, 48) is None


@pytest.mark.parametrize(("inner", "experts"), [(16, "grouped_mm"), (22, "eager"), (12, "eager")])
def test_experts_of_any_size_can_be_computed(inner: int, experts: str) -> None:
    config = resolve("moonlight-nano", fields={"moe_intermediate_size": inner})
    model = build_model(config, seed=0)
    assert model.config._experts_implementation == experts
    ids = torch.arange(24)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradient = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").grad
    assert gradient is not None and gradient.isfinite().all() and gradient.any()
