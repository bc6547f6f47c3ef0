"""The pages that answer one question: their commands, run in order with a model of nano size."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from muonscale.lab.config.load import load_config
from tests.conftest import Muonscale
from tests.docs.pages import ROOT, commands, fences, links, words_of

HOW_TO = ROOT / "docs" / "how-to"
NANO = [
    "data.sequence_length=32", "train.steps=2", "train.batch_tokens=128",
    "train.micro_batch_tokens=64", "train.precision=float32", "eval.tokens=64",
    "eval.batch_tokens=64", "eval.sample_tokens=4", "run.threads=1", "checkpoint.marks=[]",
    "train.compile=false",
]  # fmt: skip
"""A page's recipe in a size that takes seconds."""
ELSEWHERE = ("verify", "recipes", "plan", "eval")
"""Verbs whose commands are run by test_pages.py, or that need benchmarks or processes."""


def write_files(page: Path, folder: Path) -> None:
    """Write the blocks of a page that have a title, as a reader would."""
    for language in ("yaml", "json", "csv"):
        for fence in fences(page, language):
            if named := re.match(r'title="(.+)"', fence.words):
                (folder / named[1]).write_text(fence.text)


@pytest.mark.parametrize(
    "name", ["pretrain-1b", "gpt2-speedrun", "speedrun", "finetune-checkpoint", "scaling-law"]
)
def test_a_page_is_one_click_from_the_first_one(name: str) -> None:
    assert f"how-to/{name}.md" in links(ROOT / "docs" / "index.md")


@pytest.mark.slow
def test_pretraining_from_the_recipe_to_the_export(
    muonscale: Muonscale,
    corpus_file: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    page = HOW_TO / "pretrain-1b.md"
    write_files(page, tmp_path)
    given = load_config("my.yaml")
    assert given.train.batch_tokens == 2**21 and given.train.tokens == 26_800_000_000
    nano = [*NANO, "model.preset=llama-pico", f"data.path={corpus_file}", f"data.cache={cache}"]
    nano += ["data.vocab_size=300", "data.max_bytes=null", "data.validation=0.05"]
    chosen = [word for word in nano if not word.startswith(("train.micro", "train.compile"))]
    answer = muonscale("plan", "my.yaml", *chosen, "--devices", 2, "--suggest")
    assert answer.code == 0 and yaml.safe_load(answer.out)["train"]["compile"], answer.err
    ran = []
    for line in commands(page):
        verb, *words = words_of(line.replace("/shared/", ""))
        if verb in ELSEWHERE:
            continue
        if verb == "train":
            words += nano + ([] if "run.path=runs/warm" in words else ["run.path=runs/llama-1b"])
        answer = muonscale(verb, *words)
        assert answer.code == 0, (line, answer.err)
        ran.append(verb)
    assert ran == ["train", "train", "report", "export"]
    assert (tmp_path / "models" / "llama-1b" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_speedrun_from_tokens_to_the_comparison(
    muonscale: Muonscale,
    finished: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    page = HOW_TO / "gpt2-speedrun.md"
    write_files(page, tmp_path)
    (tmp_path / "fineweb10B").mkdir()
    rng = np.random.default_rng(0)
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        ids, header = rng.integers(0, 256, 4096).astype("<u2"), np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(ids)
        (tmp_path / "fineweb10B" / name).write_bytes(header.tobytes() + ids.tobytes())
    nano = [*NANO, "model.preset=gpt-nano", f"data.tokenizer={finished / 'model'}"]
    nano += [f"data.cache={cache}", "model.fields={n_positions: 32}"]
    ran = []
    for line in commands(page):
        verb, *words = words_of(line)
        if verb == "plan":
            words += [w for w in nano if not w.startswith(("train.micro", "train.compile"))]
            words += ["train.batch_tokens=512"]  # 8 devices share 16 sequences
        words = [word for word in words if not word.startswith("train.tokens=")]  # nano has steps
        answer = muonscale(verb, *words, *(nano if verb in ("train", "prepare") else ()))
        assert answer.code == 0, (line, answer.err)
        ran.append(verb)
    assert ran == ["prepare", "plan", "train", "train", "report", "train"]
    adamw = load_config("runs/speedrun-adamw").optimizer
    assert (adamw.rule, adamw.lr) == ("adamw", 6e-4)
    assert (tmp_path / "compared" / "report.html").is_file()


@pytest.mark.slow
def test_fine_tuning_from_the_recipe_to_the_answer(
    muonscale: Muonscale, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = HOW_TO / "finetune-checkpoint.md"
    write_files(page, tmp_path)
    assert load_config("tune.yaml", ["model.weights=x", "data.tokenizer=x"]).train.epochs == 2
    chat = (tmp_path / "chats.jsonl").read_text()
    (tmp_path / "chats.jsonl").write_text(
        "".join(chat.replace("2 + 3", f"{n} + 3") for n in range(40))
    )
    shutil.move(finished / "model", tmp_path / "Qwen" / "Qwen3-0.6B")
    fields = "model.fields={max_position_embeddings: 256}"
    nano = [word for word in NANO if not word.startswith(("train.steps", "data.seq"))]
    nano += ["data.sequence_length=64", fields, "data.chat_template=plain"]
    ran = []
    for line in commands(page):
        verb, *words = words_of(line)
        answer = muonscale(verb, *words, *(nano if verb == "import" else ()))
        assert answer.code == 0, (line, answer.err)
        ran.append(verb)
        if verb == "import":
            assert "validation loss before training" in answer.out
    assert ran == ["import", "import", "generate", "report"]
    config = load_config("runs/tuned")
    assert config.train.epochs is None and config.steps > 1


@pytest.mark.slow
def test_a_speedrun_ends_at_its_target(
    muonscale: Muonscale, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = HOW_TO / "speedrun.md"
    write_files(page, tmp_path)
    given = load_config("speedrun.yaml")
    assert given.train.target_loss == 3.28 and given.data.format == "tokens"
    (tmp_path / "fineweb10B").mkdir()
    ids = np.random.default_rng(0).integers(0, 20, 4000).astype(np.uint16)
    ids.tofile(tmp_path / "fineweb10B" / "train.bin")
    ids[:800].tofile(tmp_path / "fineweb10B" / "val.bin")
    nano = [*NANO, "model.preset=llama-pico", f"data.tokenizer={finished / 'tokenizer'}"]
    nano += ["train.steps=60", "train.target_loss=4.6", "eval.every=4"]
    for line in commands(page):
        verb, *words = words_of(line)
        answer = muonscale(verb, *words, *(nano if verb == "train" else ()))
        assert answer.code == 0, (line, answer.err)
    result = json.loads((tmp_path / "runs" / "speedrun" / "result.json").read_text())
    assert result["target_reached"] and 0 < result["step"] < 60


def test_a_law_from_a_table_and_from_run_folders(
    muonscale: Muonscale, trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = HOW_TO / "scaling-law.md"
    write_files(page, tmp_path)
    answer = muonscale(*words_of(commands(page)[1]), "--resamples", 100)
    assert answer.code == 0 and "muon: 9 runs, converged" in answer.out, answer.err

    for name in ("config.json", "result.json"):
        (tmp_path / "runs" / "mine").mkdir(parents=True, exist_ok=True)
        shutil.copy(trained_once / name, tmp_path / "runs" / "mine" / name)
    exec(fences(page, "python")[0].text, {})
    head, row = (tmp_path / "table.csv").read_text().split()
    assert head == "optimizer,parameters,tokens,loss" and row.startswith("muon,")
    assert row.split(",")[2] == str(12 * 256)


@pytest.mark.slow
def test_every_line_of_the_law(
    muonscale: Muonscale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = HOW_TO / "scaling-law.md"
    write_files(page, tmp_path)
    for line in commands(page):
        answer = muonscale(*words_of(line), "--resamples", 100)
        assert answer.code == 0 and "muon: 9 runs, converged" in answer.out, (line, answer.err)
