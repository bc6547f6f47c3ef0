"""A run that starts from a checkpoint and from optimizer state, on two processes as on one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from muonscale import Muon, parameter_groups
from muonscale.errors import CheckpointError
from muonscale.lab.config.load import load_config
from muonscale.lab.data.tokenizer import train_tokenizer
from muonscale.lab.parallel.topology import parse_layout
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.loop import train
from tests.cli.jobs import losses
from tests.distributed.test_training import together
from tests.optim.conftest import SMALL, causal_lm, randomize_gradients


@pytest.fixture
def words(tiny: list[str], tmp_path: Path) -> list[str]:
    model = tmp_path / "model"
    return [
        *(word for word in tiny[1:] if not word.startswith(("run.path", "model.", "train."))),
        f"model.weights={model}",
        f"data.tokenizer={model}",
        f"optimizer.state={tmp_path / 'state.pt'}",
        "optimizer.ns_dtype=float32",
        "optimizer.eps=1e-4",
        "train.steps=3",
        "train.tokens=null",
        "train.batch_tokens=128",
        "data.sequence_length=32",
    ]


def save(kind: str, folder: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a model, a tokenizer and the state of an optimizer that has made steps."""
    with monkeypatch.context() as patched:  # processes that are forked later must not have it
        patched.setitem(SMALL, "vocab_size", 300)
        model: Any = causal_lm(kind)
    if kind == "gpt2":
        model.resize_token_embeddings(300)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.arange(4.0) / 8)
    optimizer = Muon(parameter_groups(model, lr=0.01))
    for seed in range(2):
        randomize_gradients(model, seed)
        optimizer.step()
    model.config.update({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0})
    model.save_pretrained(folder / "model")
    train_tokenizer([corpus], 290).save_pretrained(str(folder / "model"))
    (folder / "model" / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "eos_token_id": [0, 7]})
    )
    torch.save(optimizer.state_dict(), folder / "state.pt")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("llama", "fsdp=2"),
        pytest.param("llama", "ddp=2", marks=pytest.mark.slow),
        pytest.param("llama", "tp=2", marks=pytest.mark.slow),
        pytest.param("gpt2", "fsdp=2", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "fsdp=2", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "fsdp=2,ep=2", marks=pytest.mark.slow),
    ],
)
def test_two_processes_start_from_a_checkpoint_as_one(
    world: Any,
    kind: str,
    layout: str,
    words: list[str],
    tmp_path: Path,
    corpus_text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(kind, tmp_path, corpus_text, monkeypatch)
    runs = {name: load_config("demo", [*words, f"run.path={tmp_path / name}"]) for name in "ab"}
    train(runs["a"], resume=False, console=RunConsole.silent())
    world(2).run(together, runs["b"], parse_layout(layout))
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-4)
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict()
        for name in "ab"
    )
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, rtol=1e-3, atol=2e-5, msg=name)
    for name in "ab":
        path = tmp_path / name / "model" / "generation_config.json"
        defaults = json.loads(path.read_text())
        assert defaults["temperature"] == 0.6 and defaults["eos_token_id"] == [0, 7]
    # and without the state they would not be the same
    without = [w for w in words if not w.startswith("optimizer.state")]
    world(2).run(
        together,
        load_config("demo", [*without, f"run.path={tmp_path / 'c'}"]),
        parse_layout(layout),
    )
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "model").state_dict()
    assert max(float((other[n] - v).abs().max()) for n, v in one.items()) > 1e-3


def refusal(config: Any, topology: Any) -> str:
    try:
        together(config, topology)
    except CheckpointError as error:
        return str(error)
    return "none"


def test_all_processes_refuse_what_the_first_cannot_read(
    world: Any, words: list[str], tmp_path: Path, corpus_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llama", tmp_path, corpus_text, monkeypatch)
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "model" / "model.safetensors")
    config = load_config("demo", [*words, f"run.path={tmp_path / 'run'}"])
    said = world(2).run(refusal, config, parse_layout("fsdp=2"))
    assert all("cannot be loaded" in text for text in said)
