"""`muonscale train` on conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muonscale.lab.config.load import load_config
from muonscale.lab.data.loss_mask import count_targets
from muonscale.lab.data.prepare import prepare
from tests.cli.jobs import losses, records
from tests.conftest import Muonscale
from tests.lab.data.chat.chats import CHATML, characters_tokenizer, conversations, write_chats


@pytest.fixture
def words(tiny: list[str], tmp_path: Path) -> list[str]:
    """Words after `muonscale train` that train a very small model on chats."""
    dropped = ("data.path", "data.vocab_size", "data.sequence_length")
    return [
        *(word for word in tiny if not word.startswith(dropped)),
        f"data.path={write_chats(tmp_path / 'x.jsonl', conversations(120))}",
        "data.format=chat",
        f"data.tokenizer={characters_tokenizer(tmp_path / 'tokenizer', CHATML)}",
        "data.sequence_length=128",
        "train.batch_tokens=512",
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_a_run_says_what_became_of_the_conversations(
    muonscale: Muonscale, words: list[str], tmp_path: Path
) -> None:
    answer = muonscale("train", *words)
    assert answer.code == 0, answer.err
    assert "conversations cut" in answer.out and "bits per byte" not in answer.out
    run = tmp_path / "run"
    trained = records(run, "train")
    assert all(0 < record["targets"] < record["tokens"] for record in trained)
    assert trained[-1]["loss"] < trained[0]["loss"]
    env = json.loads((run / "env.json").read_text())
    (data,) = env["data"].values()
    assert data["read"]["conversations"] == data["train"]["documents"]
    assert data["train"]["targets"] < data["train"]["tokens"]
    result = json.loads((run / "result.json").read_text())
    (corpus,) = prepare(
        load_config(words[0], words[1:]).data, seed=0, report=lambda *report: None
    ).values()
    rows = corpus.validation.rows(128)
    assert result["validation_tokens"] == count_targets(rows.batch(range(len(rows))))  # type: ignore[arg-type]
    assert "bits_per_byte" not in result and result["unigram_loss"] > result["bigram_loss"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template == CHATML


def test_a_resumed_run_is_the_uninterrupted_one(
    muonscale: Muonscale, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    assert muonscale("train", *words, f"run.path={whole}").code == 0
    from muonscale.lab.training import loop

    steps = loop.train_step

    def fail(state, *arguments, **options):  # type: ignore[no-untyped-def]
        if state.step == 7:
            raise KeyboardInterrupt
        return steps(state, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", fail)
        assert muonscale("train", *words).code == 130
    assert muonscale("train", tmp_path / "run", "--resume").code == 0
    assert losses(tmp_path / "run") == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(tmp_path / "run")[name], tensor), name


def test_the_first_step_is_the_same_in_micro_batches(
    muonscale: Muonscale, words: list[str], tmp_path: Path
) -> None:
    first = []
    for name, extra in (("one", []), ("four", ["train.micro_batch_tokens=128"])):
        run = tmp_path / name
        answer = muonscale("train", *words, *extra, "train.steps=2", f"run.path={run}")
        assert answer.code == 0, answer.err
        first.append([(r["loss"], r["targets"]) for r in records(run, "train")])
    assert first[0] == [(pytest.approx(loss, rel=1e-4), count) for loss, count in first[1]]


def test_a_mixture_of_text_and_chats_weighs_every_target_the_same(
    muonscale: Muonscale, words: list[str], corpus_file: Path, tmp_path: Path
) -> None:
    chats = next(word for word in words if word.startswith("data.path=")).partition("=")[2]
    dropped = ("data.path", "data.format")
    mixture = f"[{{path: {corpus_file}, weight: 1}}, {{path: {chats}, weight: 1, format: chat}}]"
    words = [word for word in words if not word.startswith(dropped)]
    answer = muonscale("train", *words, f"data.mixture={mixture}")
    assert answer.code == 0, answer.err
    trained = records(tmp_path / "run", "train")
    # of 48 rows half are text, in which every token is a target
    assert sum(record["targets"] for record in trained) > 24 * 128
    assert all(record["targets"] <= 512 for record in trained)
    (last,) = [r for r in records(tmp_path / "run", "eval") if r["step"] == 12]
    assert last["validation_losses"].keys() == {"corpus.txt", "x.jsonl"}
    assert "bits_per_byte" not in last


def test_another_template_is_other_data(
    muonscale: Muonscale, words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    words = [*words, f"data.chat_template={file}"]
    assert muonscale("train", *words, "train.steps=5").code == 0
    (tmp_path / "run" / "result.json").unlink()
    file.write_text("x" + CHATML)
    answer = muonscale("train", tmp_path / "run", "--resume")
    assert answer.code == 2 and "fingerprint" in answer.err


def test_a_model_that_mixes_conversations_is_refused(
    muonscale: Muonscale, words: list[str], tmp_path: Path
) -> None:
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps({"model_type": "opt", "num_attention_heads": 4, "hidden_size": 32}))
    words = [word for word in words if not word.startswith("model.preset")]
    answer = muonscale("train", *words, f"model.config={shape}")
    assert answer.code == 2 and "model_type 'opt'" in answer.err


def test_the_dry_run_takes_chats(muonscale: Muonscale, words: list[str]) -> None:
    answer = muonscale("train", *words, "--dry-run")
    assert answer.code == 0 and "parameters" in answer.out, answer.err
