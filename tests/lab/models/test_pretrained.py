"""Shape and weights of checkpoints written by transformers itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from muonscale.errors import CheckpointError, ConfigError
from muonscale.lab.config.sections import ModelSection
from muonscale.lab.models.pretrained import (
    hash_files,
    load_weights,
    pretrained_config,
    weight_files,
)
from tests.optim.conftest import causal_lm

IDS = torch.tensor([[1, 5, 9, 33]])
KINDS = ["llama", "llama_tied", "gpt2", "gemma3", "mixtral", "deepseek_v3"]


def shape_of(folder: Path, tokens: int = 50, length: int = 16, **fields):
    section = ModelSection(weights=folder, fields=fields)
    return pretrained_config(section, tokens=tokens, sequence_length=length)


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **shards) -> PreTrainedModel:
    model = causal_lm(kind)
    assert isinstance(model, PreTrainedModel)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.arange(4.0) / 8)
    copy.deepcopy(model).to(dtype).save_pretrained(folder, **shards)
    for parameter in model.parameters():  # and not the rotary frequencies, which are not saved
        parameter.data = parameter.data.to(dtype).to(torch.float32)
    return model.eval()


def change(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_saved_ones_in_float32(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path, torch.bfloat16)
    loaded = load_weights(tmp_path, shape_of(tmp_path)).eval()
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, values in loaded.state_dict().items():
        assert values.dtype == torch.float32 and torch.equal(values, expected[name]), name
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))  # tied ones stay tied
    assert loaded.config.use_cache is False


def test_experts_come_from_their_published_names_with_the_routers_bias(tmp_path: Path) -> None:
    model = saved("deepseek_v3", tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names
    loaded = load_weights(tmp_path, shape_of(tmp_path))
    gate = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(loaded.get_buffer(gate), torch.arange(4.0) / 8)
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(loaded.get_parameter(stack), model.get_parameter(stack))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("gpt2", "transformer.wpe.weight"),
        ("deepseek_v3", "model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
    ],
)
def test_missing_weights_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    shape = shape_of(tmp_path)
    change(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"lacks|cannot be loaded"):
        load_weights(tmp_path, shape)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    shape = shape_of(tmp_path)
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(51, 16)}))
    with pytest.raises(CheckpointError, match=r"lm_head|shape|mismatch"):
        load_weights(tmp_path, shape)


def test_unexpected_weights_are_refused_and_known_leftovers_are_not(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    shape = shape_of(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(tmp_path, lambda tensors: tensors.update({name: torch.ones(4)}))
    load_weights(tmp_path, shape)
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    change(tmp_path, lambda tensors: tensors.update({name: torch.ones(4)}))
    with pytest.raises(CheckpointError, match=r"contains 1 weights .*\(llama\).*lora_A"):
        load_weights(tmp_path, shape)


def test_shards_are_read_and_a_missing_one_is_named(tmp_path: Path) -> None:
    model = saved("llama", tmp_path, max_shard_size="5KB")
    files = weight_files(tmp_path)
    assert len(files) > 1
    loaded = load_weights(tmp_path, shape_of(tmp_path))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert list(hash_files(files)) == [path.name for path in files]
    files[1].unlink()
    with pytest.raises(
        CheckpointError, match=f"lacks 1 of its {len(files)} files.*{files[1].name}"
    ):
        weight_files(tmp_path)


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    before = hash_files(weight_files(tmp_path))
    change(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert hash_files(weight_files(tmp_path)) != before


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        weight_files(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        weight_files(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.weights: there is no .*config\.json"):
        shape_of(tmp_path)
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantized"):
        shape_of(tmp_path)


def test_a_vocabulary_may_be_padded_and_keeps_its_special_tokens(tmp_path: Path) -> None:
    model = causal_lm("llama")
    model.config.bos_token_id, model.config.eos_token_id = 3, [4, 5]
    model.config.pad_token_id = 6
    model.save_pretrained(tmp_path)
    shape = shape_of(tmp_path, tokens=47)
    assert shape.vocab_size == 50 and shape.bos_token_id == 3 and shape.eos_token_id == [4, 5]
    assert shape.pad_token_id == 6
    # ... and the row of the padding token is trained, as it may be another token's too
    loaded = load_weights(tmp_path, shape)
    loaded(torch.tensor([[6, 1]])).logits.sum().backward()
    assert loaded.get_input_embeddings().weight.grad[6].any()
    with pytest.raises(ConfigError, match=r"51 tokens .* 50"):
        shape_of(tmp_path, tokens=51)


@pytest.mark.parametrize(
    ("kind", "fields", "name"),
    [
        ("llama", {"hidden_size": 32}, "shape"),
        ("llama", {"num_hidden_layers": 1}, "model.layers.1"),
        ("llama", {"tie_word_embeddings": True}, "lm_head.weight"),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}, "num_attention_heads"),
        ("gpt2", {"n_head": 4}, "num_attention_heads is 2"),
        ("gpt2", {"n_positions": 64}, "wpe"),
        ("deepseek_v3", {"n_routed_experts": 8}, "experts"),
    ],
)
def test_fields_that_change_weights_are_refused(kind, fields, name: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    with pytest.raises(ConfigError, match=r"model\.fields must not change") as error:
        shape_of(tmp_path, **fields)
    assert name in str(error.value)


def test_fields_that_leave_weights_as_they_are_are_applied(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "gpt2")
    shape = shape_of(tmp_path / "gpt2", resid_pdrop=0.3)
    assert load_weights(tmp_path / "gpt2", shape).transformer.h[0].mlp.dropout.p == 0.3
    saved("llama", tmp_path / "llama")
    assert shape_of(tmp_path / "llama", rope_theta=5.0).rope_parameters["rope_theta"] == 5.0
    assert shape_of(tmp_path / "llama").rope_parameters["rope_theta"] == 10000.0


def test_a_sequence_longer_than_the_positions_is_never_taken_silently(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "gpt2")
    assert shape_of(tmp_path / "gpt2", length=32).max_position_embeddings == 32
    with pytest.raises(ConfigError, match="33 is more than the 32") as learned:
        shape_of(tmp_path / "gpt2", length=33)
    assert "max_position_embeddings" not in str(learned.value)
    saved("llama", tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"model\.fields\.max_position_embeddings=33"):
        shape_of(tmp_path / "llama", length=33)
    shape = shape_of(tmp_path / "llama", length=33, max_position_embeddings=33)
    assert shape.max_position_embeddings == 33


def test_positions_that_the_file_leaves_out_are_transformers_default(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).config.max_position_embeddings
    assert shape_of(tmp_path).max_position_embeddings == expected > 1000
