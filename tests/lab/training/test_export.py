"""Exporting checkpoints, through the command line: what transformers loads is what was trained."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Ernie4_5_MoeConfig

from muonscale.lab.config.sections import ModelSection
from muonscale.lab.data.tokenizer import open_tokenizer
from muonscale.lab.models.build import build_model
from muonscale.lab.models.config import model_config
from muonscale.lab.models.presets import PRESETS
from muonscale.lab.training.export import shape_of, unfilled_model
from muonscale.lab.training.setup import model_facts
from muonscale.lab.training.state import TrainState
from tests.conftest import Answer, Muonscale, tiny_words, train_shared

IDS = torch.tensor([[1, 5, 9, 60, 33, 120, 7, 7, 250, 0, 14]])
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"

DEEPSEEK = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt-nano", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "llama": ("llama-pico", {}),
    "gemma3": (
        "gemma-nano",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4,
        },
    ),
    "deepseek_v3": ("moonlight-nano", DEEPSEEK),
}

Logits = dict[int, Tensor]
Trained = Callable[[str], Path]


def words_of(kind: str) -> list[str]:
    """Return words that train a model of a kind for four steps, a checkpoint after each."""
    preset, fields = KINDS[kind]
    own = [f"model.preset={preset}", f"model.fields={json.dumps(fields)}", "optimizer.lr=0.05"]
    return [*own, "train.steps=4", "eval.every=2", "checkpoint.every=1", "checkpoint.keep=9"]


@pytest.fixture(scope="module")
def runs(
    corpus_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Logits]]:
    """Train a run of a kind, and hear what the model answers to IDS whenever it is saved, by step.

    Every kind is trained once; the folders and the answers are only to be read.
    """
    root = tmp_path_factory.mktemp("exported")
    save = TrainState.save

    @functools.cache
    def of(kind: str) -> tuple[Path, Logits]:
        found: Logits = {}

        def listening(state: TrainState, *args: Any, **options: Any) -> None:
            with state.forward.evaluation(), torch.no_grad():
                found[state.step] = state.model(IDS).logits.clone()
            save(state, *args, **options)

        folder = root / kind / "run"
        folder.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainState, "save", listening)
            train_shared(*tiny_words(folder, corpus_file, cache), *words_of(kind))
        return folder, found

    return of


@pytest.fixture
def logits(runs: Callable[[str], tuple[Path, Logits]]) -> Callable[[str], Logits]:
    """What the trained model of a kind answered to IDS whenever it was saved, by step."""
    return lambda kind: runs(kind)[1]


@pytest.fixture
def trained(runs: Callable[[str], tuple[Path, Logits]], tmp_path: Path) -> Trained:
    """Copy a trained run of a kind to tmp_path/run, and return that folder."""
    return lambda kind: Path(shutil.copytree(runs(kind)[0], tmp_path / "run"))


@pytest.fixture
def exported(muonscale: Muonscale, tmp_path: Path) -> Callable[..., Path]:
    """Export a checkpoint and return the folder."""

    def export(source: object, *options: object) -> Path:
        answer = muonscale("export", source, tmp_path / "out", *options)
        assert answer.code == 0, answer.err
        return tmp_path / "out"

    return export


def answers(folder: Path, **options: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(IDS).logits


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def refused(answer: Answer, *words: str) -> None:
    assert answer.code == 2 and "Traceback" not in answer.err
    for word in words:
        assert word in answer.err


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_model_as_it_was_trained(
    kind: str,
    trained: Trained,
    exported: Callable[..., Path],
    logits: Callable[[str], Logits],
) -> None:
    run, expected = trained(kind), logits(kind)
    torch.testing.assert_close(answers(exported(f"{run}@3")), expected[3], rtol=0, atol=1e-6)
    assert (expected[3] - expected[2]).abs().max() > 1e-3  # so that another step would be noticed
    torch.testing.assert_close(answers(exported(run)), expected[4], rtol=0, atol=1e-6)
    folder = exported(f"{run}@4")
    for name in ("config.json", "generation_config.json", "model.safetensors", "README.md"):
        assert (folder / name).read_bytes() == (run / "model" / name).read_bytes(), name


def deepseek_names() -> dict[str, list[int]]:
    """Return names and shapes of DeepSeek-V3's published layout for DEEPSEEK and 300 tokens."""
    shapes = {
        "model.embed_tokens.weight": [300, 32],
        "model.norm.weight": [32],
        "lm_head.weight": [300, 32],
        "model.layers.0.mlp.gate_proj.weight": [48, 32],
        "model.layers.0.mlp.up_proj.weight": [48, 32],
        "model.layers.0.mlp.down_proj.weight": [32, 48],
        "model.layers.1.mlp.gate.weight": [4, 32],
        "model.layers.1.mlp.gate.e_score_correction_bias": [4],
        "model.layers.1.mlp.shared_experts.gate_proj.weight": [24, 32],
        "model.layers.1.mlp.shared_experts.up_proj.weight": [24, 32],
        "model.layers.1.mlp.shared_experts.down_proj.weight": [32, 24],
    }
    for expert in range(4):
        shapes[f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"] = [12, 32]
        shapes[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"] = [12, 32]
        shapes[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] = [32, 12]
    for layer in range(2):
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = [32]
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = [32]
        attention = f"model.layers.{layer}.self_attn"
        shapes[f"{attention}.q_proj.weight"] = [24, 32]
        shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = [20, 32]
        shapes[f"{attention}.kv_a_layernorm.weight"] = [16]
        shapes[f"{attention}.kv_b_proj.weight"] = [36, 16]
        shapes[f"{attention}.o_proj.weight"] = [32, 20]
    return shapes


def test_deepseek_v3_has_its_published_layout(
    trained: Trained, exported: Callable[..., Path]
) -> None:
    weights = load_file(exported(f"{trained('deepseek_v3')}@3") / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in weights.items()} == deepseek_names()
    assert weights[BIAS].count_nonzero()


def test_a_tied_head_is_stored_once(trained: Trained, exported: Callable[..., Path]) -> None:
    with safe_open(exported(trained("gpt2")) / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names


def test_weights_are_divided_over_files_with_an_index(
    trained: Trained, exported: Callable[..., Path], logits: Callable[[str], Logits]
) -> None:
    folder = exported(trained("deepseek_v3"), "--max-shard-size", "60KB")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and "model.safetensors" not in files
    assert all((folder / name).stat().st_size < 70_000 for name in files)
    places = read(folder / "model.safetensors.index.json")["weight_map"]
    assert places.keys() == deepseek_names().keys() and set(places.values()) == set(files)
    torch.testing.assert_close(answers(folder), logits("deepseek_v3")[4], rtol=0, atol=1e-6)


def test_in_bfloat16_every_parameter_is_rounded_and_no_bias(
    trained: Trained, exported: Callable[..., Path]
) -> None:
    run = trained("deepseek_v3")
    whole = load_file(exported(run) / "model.safetensors")
    folder = exported(run, "--dtype", "bfloat16")
    rounded = load_file(folder / "model.safetensors")
    assert whole[BIAS].dtype == rounded[BIAS].dtype == torch.float32
    assert torch.equal(rounded.pop(BIAS), whole.pop(BIAS))
    assert rounded.keys() == whole.keys()
    for name, tensor in rounded.items():
        assert whole[name].dtype == torch.float32 and tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, whole[name].to(torch.bfloat16)), name
    config = read(folder / "config.json")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert loaded.get_buffer(BIAS).dtype == torch.float32


def test_a_tied_head_stays_tied_in_bfloat16(
    trained: Trained, exported: Callable[..., Path], logits: Callable[[str], Logits]
) -> None:
    folder = exported(trained("gemma3"), "--dtype", "bfloat16")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    expected = logits("gemma3")[4]
    torch.testing.assert_close(answers(folder, dtype=torch.float32), expected, rtol=0, atol=0.05)


def test_the_run_folder_is_enough(
    exported: Callable[..., Path],
    muonscale: Muonscale,
    tiny: list[str],
    corpus_text: str,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    words = [*words_of("llama"), "train.steps=1", f"data.cache={tmp_path / 'cache'}"]
    assert muonscale("train", *tiny, *words).code == 0
    cached = next((tmp_path / "cache").glob("*/tokenizer"))
    expected = open_tokenizer(cached).encode(corpus_text[:5000])
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(run / "model")
    for folder in (run / "tokenizer", exported(run)):
        assert AutoTokenizer.from_pretrained(folder).encode(corpus_text[:5000]) == expected


def test_a_run_without_a_tokenizer_folder(
    trained: Trained, exported: Callable[..., Path], muonscale: Muonscale, tmp_path: Path
) -> None:
    run = trained("llama")
    written = (run / "tokenizer" / "tokenizer.json").read_bytes()
    shutil.rmtree(run / "tokenizer")
    assert (exported(run) / "tokenizer.json").read_bytes() == written  # of the finished model
    shutil.rmtree(run / "model")
    (run / "result.json").unlink()
    refused(muonscale("export", run, tmp_path / "none"), "no folder `tokenizer`", "--resume")
    assert muonscale("train", run, "--resume").code == 0
    assert (run / "tokenizer" / "tokenizer.json").read_bytes() == written


def test_an_unfinished_run_is_exported_and_generates(
    trained: Trained, exported: Callable[..., Path], muonscale: Muonscale
) -> None:
    run = trained("llama")
    shutil.rmtree(run / "model")
    (run / "result.json").unlink()
    refused(muonscale("generate", run, "x"), "not finished", f"muonscale export {run} FOLDER")
    before = sorted(run.rglob("*"))
    answer = muonscale("generate", exported(run), "import", "--tokens", 3)
    assert answer.code == 0 and answer.out.startswith("import")
    assert sorted(run.rglob("*")) == before


def test_a_damaged_checkpoint_is_refused_or_passed_over(
    trained: Trained,
    muonscale: Muonscale,
    logits: Callable[[str], Logits],
    tmp_path: Path,
) -> None:
    run, out = trained("llama"), tmp_path / "out"
    data = next((run / "checkpoints" / "step-00000004").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[-100] ^= 1
    data.write_bytes(content)
    refused(muonscale("export", f"{run}@4", out), "step-00000004 is damaged", "has changed")
    assert not out.exists()
    answer = muonscale("export", run, out)
    assert answer.code == 0 and answer.out.startswith("step 3 of ")
    assert "step-00000004 is damaged" in answer.err
    torch.testing.assert_close(answers(out), logits("llama")[3], rtol=0, atol=1e-6)


def test_what_cannot_be_exported_gets_a_sentence(
    trained: Trained, muonscale: Muonscale, tmp_path: Path
) -> None:
    run, out = trained("llama"), tmp_path / "out"
    for step in (1, 2):  # as if every third had been saved
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    refused(muonscale("export", f"{run}@2", out), "no checkpoint of step 2", "3, 4")
    refused(muonscale("export", f"{run}@20M", out), "'20M'", "whole number")
    refused(muonscale("export", run, out, "--dtype", "float16"), "float16", "float32, bfloat16")
    refused(muonscale("export", run, out, "--max-shard-size", "5x"), "5x", "such as 5GB")
    refused(muonscale("export", tmp_path / "none", out), "none", "does not exist")
    refused(muonscale("export", run / "model", out), "not a run folder")
    refused(muonscale("export", run, run), "not an exported model")
    shutil.rmtree(run / "checkpoints")
    refused(muonscale("export", run, out), "no checkpoints yet")
    assert not out.exists()


def test_a_run_folder_may_have_an_at_in_its_name(
    trained: Trained, exported: Callable[..., Path], logits: Callable[[str], Logits]
) -> None:
    run = trained("llama")
    named = run.rename(run.with_name("run@2"))
    torch.testing.assert_close(answers(exported(named)), logits("llama")[4], rtol=0, atol=1e-6)
    third = answers(exported(f"{named}@3"))
    torch.testing.assert_close(third, logits("llama")[3], rtol=0, atol=1e-6)


def test_a_checkpoint_has_a_card_of_its_own_step(
    trained: Trained, exported: Callable[..., Path], tmp_path: Path
) -> None:
    run = trained("deepseek_v3")
    card = ModelCard.load(exported(f"{run}@3") / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["muonscale", "deepseek_v3", "muon"]
    evaluated = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = next(r["validation_loss"] for r in evaluated if r["kind"] == "eval" and r["step"] == 2)
    for text in (
        "after 3 steps and 768 training tokens",
        "| routed experts | 4 |",
        "| source | corpus.txt |",
        f"| validation loss, nats per token | {loss:.4f} |",
        "| measured after step | 2 |",
        "| `optimizer.lr` | 0.05 |",
        "| `routing.bias_rate` | auto |",
        f"| torch | {version('torch')} |",
        "muonscale train demo run.path=run ",
    ):
        assert text in card.text, text
    assert str(tmp_path) not in card.content and str(tmp_path.parent) not in card.content
    assert "after 4 steps" in (run / "model" / "README.md").read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_is_rebuilt_from_the_facts_of_its_checkpoint(preset: str) -> None:
    section = ModelSection(preset=preset)
    shape = model_config(section, vocab_size=300, sequence_length=32, bos_id=0, eos_id=0)
    again = shape_of(json.loads(json.dumps(model_facts(shape))), Path("checkpoint"))
    differing = {"dtype", "use_cache"}
    tree, expected = (
        {k: v for k, v in json.loads(json.dumps(config.to_dict())).items() if k not in differing}
        for config in (again, shape)
    )
    assert type(again) is type(shape) and tree == expected


def test_what_transformers_keeps_in_float32_is_rounded_but_for_biases(tmp_path: Path) -> None:
    """Of Ernie, whose bias is a parameter and whose router transformers keeps in float32."""
    shape = Ernie4_5_MoeConfig(
        hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, vocab_size=50, moe_num_experts=4, moe_k=2,
        moe_layer_start_index=1, pad_token_id=None, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    model = unfilled_model(shape, torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in kept} == {"e_score_correction_bias"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    model.save_pretrained(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if "bias" in name else torch.bfloat16), name


ROPE = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 2e4}


@pytest.mark.parametrize("kind", [*KINDS, "yarn"])
def test_nothing_but_weights_is_missing_before_they_are_read(kind: str) -> None:
    preset, fields = KINDS.get(kind, ("llama-pico", {"rope_parameters": ROPE}))
    section = ModelSection(preset=preset, fields=fields)
    shape = model_config(section, vocab_size=300, sequence_length=32, bos_id=0, eos_id=0)
    model, expected = unfilled_model(shape).eval(), build_model(shape, seed=3).eval()
    for (name, buffer), (_, theirs) in zip(
        model.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, theirs), name
    saved = expected.state_dict()
    assert model.state_dict().keys() == saved.keys()
    assert len(list(model.parameters())) == len(list(expected.parameters()))  # tied ones are one
    for name, tensor in model.state_dict().items():
        tensor.copy_(saved[name])
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
