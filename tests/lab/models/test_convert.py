from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from muonscale.errors import CheckpointError
from muonscale.lab.config.sections import ModelSection
from muonscale.lab.models.build import build_model
from muonscale.lab.models.config import model_config
from muonscale.lab.models.convert import load_hf, save_hf, save_tokenizer

IDS = torch.tensor([[1, 5, 9, 60, 33]])


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {char: i + 1 for i, char in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, bos_token=end)


def build(**section: Any) -> PreTrainedModel:
    section = section or {"preset": "llama-pico"}
    config = model_config(
        ModelSection(**section), vocab_size=257, sequence_length=32, bos_id=0, eos_id=0
    )
    return build_model(config, seed=1)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_transformers_loads_the_same_model_and_generates(tmp_path: Path, tokenizer):
    model = build().eval()
    save_hf(model, tokenizer, tmp_path / "new" / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model")
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    text = AutoTokenizer.from_pretrained(tmp_path / "new" / "model")
    assert text("h\u00e9llo", add_special_tokens=False).input_ids == tokenizer.encode("h\u00e9llo")
    written = loaded.generate(IDS, max_new_tokens=6, do_sample=False)
    assert written.shape == (1, 11) or written[0, -1] == 0
    expected = IDS
    for _ in range(written.shape[1] - 5):
        best = model(expected).logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, best], dim=1)
    assert torch.equal(written, expected)


def test_the_cache_is_on_in_the_files_and_off_in_the_model(tmp_path: Path, tokenizer):
    model = build()
    model.generation_config.use_cache = False
    save_hf(model, tokenizer, tmp_path / "model")
    loaded, _ = load_hf(tmp_path / "model")
    assert model.config.use_cache is False
    assert loaded.config.use_cache is True
    assert loaded.generation_config.use_cache is True
    assert loaded.generation_config.pad_token_id == 0


def test_both_spellings_of_renamed_fields_are_written(tmp_path: Path, tokenizer):
    save_hf(build(preset="llama-pico", fields={"rope_theta": 5e5}), tokenizer, tmp_path / "model")
    config = read(tmp_path / "model" / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert "rope_scaling" not in config
    tokenizer_config = read(tmp_path / "model" / "tokenizer_config.json")
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("kind", ["yarn", "gemma3_text"])
def test_rotary_settings_survive_and_an_old_reader_gets_them_too(
    tmp_path: Path, tokenizer, kind: str
):
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 2e4}
    source = {"model_type": "gemma3_text", "head_dim": 8, "num_key_value_heads": 2}
    source |= {"rope_theta": 3e5, "rope_local_base_freq": 7e3}
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(source | shape | {"num_hidden_layers": 6}))
    if kind == "yarn":
        model = build(preset="llama-pico", fields={"rope_parameters": rope})
    else:
        model = build(config=tmp_path)
    save_hf(model, tokenizer, tmp_path / "model")
    loaded = AutoConfig.from_pretrained(tmp_path / "model")
    assert loaded.rope_parameters == model.config.rope_parameters
    config = read(tmp_path / "model" / "config.json")
    del config["rope_parameters"], config["model_type"]
    assert type(loaded)(**config).rope_parameters == model.config.rope_parameters


def test_loading_gives_back_the_model_and_its_tokenizer(tmp_path: Path, tokenizer):
    model = build().eval()
    save_hf(model, tokenizer, tmp_path / "model")
    loaded, text = load_hf(tmp_path / "model")
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert not loaded.training
    assert text.eos_token_id == 0


def test_files_of_weights_can_be_read_by_whoever_reads_the_others(tmp_path: Path, tokenizer):
    save_hf(build(), tokenizer, tmp_path / "model")
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1


def test_a_tokenizer_alone_is_replaced_whole(tmp_path: Path, tokenizer):
    folder = tmp_path / "tokenizer"
    for _ in range(2):
        save_tokenizer(tokenizer, folder)
        text = AutoTokenizer.from_pretrained(folder)
        assert text.encode("hello") == tokenizer.encode("hello")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_saving_and_loading_print_nothing(tmp_path: Path, tokenizer, capfd):
    save_hf(build(), tokenizer, tmp_path / "model")
    load_hf(tmp_path / "model")
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_is_replaced_whole(tmp_path: Path, tokenizer):
    folder = tmp_path / "model"
    save_hf(build(preset="llama-pico", fields={"num_hidden_layers": 1}), tokenizer, folder)
    (folder / "leftover.txt").write_text("of the first export")
    save_hf(build(), tokenizer, folder)
    assert load_hf(folder)[0].config.num_hidden_layers == 2
    assert not (folder / "leftover.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, tokenizer, monkeypatch):
    folder = tmp_path / "model"
    save_hf(build(), tokenizer, folder)
    before = (folder / "model.safetensors").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        save_hf(build(preset="llama-nano"), tokenizer, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path, tokenizer):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_text("{}")
    with pytest.raises(CheckpointError, match="not an exported model"):
        save_hf(build(), tokenizer, run)
    with pytest.raises(CheckpointError, match="not an exported model"):
        save_hf(build(), tokenizer, run / "config.json")
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl"]


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path, tokenizer):
    folder = tmp_path / "model"
    with pytest.raises(CheckpointError, match="is not a Hugging Face checkpoint"):
        load_hf(folder)
    save_hf(build(), tokenizer, folder)
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_hf(folder)
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    load_hf(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*safetensors"):
        load_hf(folder)


def test_missing_weights_are_never_filled_with_random_ones(tmp_path: Path, tokenizer):
    save_hf(build(), tokenizer, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights.*lm_head.weight"):
        load_hf(tmp_path / "model")
