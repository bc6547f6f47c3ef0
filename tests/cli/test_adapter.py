"""Fine-tuning with LoRA adapters, through the command line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cli.jobs import job, losses, weights
from tests.conftest import Muonscale

LORA = ["adapter.rank=3", "adapter.alpha=12", "train.steps=6", "checkpoint.every=2", "eval.every=4"]


@pytest.fixture
def words(tiny: list[str], trained_once: Path) -> list[str]:
    """Words after `muonscale train` that adapt the model of a finished run."""
    base = trained_once / "model"
    given = [word for word in tiny if not word.startswith("model.")]
    return [*given, f"model.weights={base}", f"data.tokenizer={base}", "checkpoint.keep=9", *LORA]


def test_an_adapter_is_trained_merged_saved_and_exact_on_resume(
    muonscale: Muonscale, words: list[str], trained_once: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    answer = muonscale("train", *words)
    assert answer.code == 0, answer.err
    base = load_file(trained_once / "model" / "model.safetensors")
    merged = load_file(run / "model" / "model.safetensors")
    factors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    linear = {name for name in base if name.endswith("proj.weight")}
    assert changed == linear  # and not embeddings, head and norms
    for name in linear:
        begin = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (factors[f"{begin}.lora_{factor}.weight"] for factor in "AB")
        assert a.shape[0] == b.shape[1] == 3
        torch.testing.assert_close(merged[name], base[name] + 12 / 3 * b @ a)

    adapted = AutoModelForCausalLM.from_pretrained(trained_once / "model")
    adapted = PeftModel.from_pretrained(adapted, str(run / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(run / "model")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )
    result = json.loads((run / "result.json").read_text())
    assert result["validation_loss"] < result["start_validation_loss"]
    assert set(json.loads((run / "metrics.jsonl").read_text().splitlines()[1])["lr"]) == {"hidden"}

    before = {name: (run / name / "model.safetensors").read_bytes() for name in ("model",)}
    answer = muonscale("export", f"{run}@6", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == merged.keys()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before["model"]
    answer = muonscale("export", f"{run}@6", tmp_path / "bf16", "--dtype", "bf16")
    rounded = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(torch.equal(rounded[name], merged[name].bfloat16()) for name in merged)

    for left in ("model", "adapter", "checkpoints/step-00000006"):
        shutil.rmtree(run / left)
    (run / "result.json").unlink()
    answer = muonscale("train", run, "--resume")
    assert answer.code == 0 and "at step 4 of 6" in answer.out, answer.err
    assert weights(run) == before["model"]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["model.weights=null", "model.preset=llama-pico"], "excludes model.weights=null"),
        (["adapter.rank=null"], "adapter.alpha=12.0 is given, and adapter.rank is null"),
        (["optimizer.qk_clip=100"], "adapter.rank=3 excludes optimizer.qk_clip"),
        (["parallel.tensor=2"], "adapter.rank=3 excludes parallel.tensor=2"),
        (["adapter.targets=[nothing]"], "adapter.targets=['nothing']: "),
    ],
)
def test_what_an_adapter_excludes(
    more: list[str], error: str, muonscale: Muonscale, words: list[str], tmp_path: Path
) -> None:
    answer = muonscale("train", *words, *more)
    assert answer.code == 2 and error in answer.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_peft_an_adapter_is_refused(
    muonscale: Muonscale, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    answer = muonscale("train", *words, "--dry-run")
    assert answer.code == 2 and "pip install 'muonscale[lora]'" in answer.err


def test_a_dry_run_shows_the_factors_and_plan_refuses(
    muonscale: Muonscale, words: list[str], tmp_path: Path
) -> None:
    answer = muonscale("train", *words, "--dry-run")
    assert answer.code == 0 and "lora_A" in answer.out, answer.err
    assert "FLOPs      not counted: frozen weights" in answer.out
    answer = muonscale("train", *words, "--dry-run", "--json")
    (tmp_path / "tune.json").write_text(answer.out)
    answer = muonscale("plan", tmp_path / "tune.json")
    assert answer.code == 2 and "adapter.rank=null for an upper bound" in answer.err


@pytest.mark.slow
@pytest.mark.parametrize("data", ["fsdp", "ddp"])
def test_two_processes_adapt_as_one(
    data: str, muonscale: Muonscale, words: list[str], tmp_path: Path
) -> None:
    words = [*words, "optimizer.ns_dtype=float32"]
    assert muonscale("train", *words, f"run.path={tmp_path / 'one'}").code == 0
    run = tmp_path / "two"
    with job(2, [*words, f"run.path={run}", f"parallel.data={data}"]) as two:
        output = two.output()
    assert two.code == 0, output
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one = load_file(tmp_path / "one" / "model" / "model.safetensors")
    for name, value in load_file(run / "model" / "model.safetensors").items():
        torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-4)
