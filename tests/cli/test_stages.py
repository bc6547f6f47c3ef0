"""A run in stages: data, batch and learning rate change on the way."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from muonscale.lab.config.load import load_config
from muonscale.lab.data.prepare import prepare
from muonscale.lab.data.tokens import Sequences
from tests.cli.test_train import metrics, refused, weights
from tests.conftest import Muonscale
from tests.lab.models.losses import loss_on_batches


@pytest.fixture
def staged(tiny: list[str], corpus_text: str, tmp_path: Path) -> list[str]:
    """Words for `train`: 16 steps of 8 sequences, then 8 of 16; prose in the last third."""
    (tmp_path / "prose.txt").write_text(corpus_text[-40_000:].upper())
    (tmp_path / "code.txt").write_text(corpus_text[:100_000])
    mixture = [
        {"path": str(tmp_path / "code.txt"), "weight": 3, "name": "code"},
        {"path": str(tmp_path / "prose.txt"), "weight": 1, "name": "prose"},
    ]
    stages = [
        {"until": 2048, "name": "constant", "warmup": 8},
        {"until": 0.75, "name": "cosine", "weights": {"code": 1}},
        {"name": "linear", "final": 0, "peak": 0.5, "weights": {"code": 1, "prose": 3}},
    ]
    return [
        *(word for word in tiny if not word.startswith(("data.path", "train."))),
        f"data.mixture={json.dumps(mixture)}",
        "schedule.name=stages",
        f"schedule.stages={json.dumps(stages)}",
        "train.tokens=8192",
        "train.batch_tokens=256",
        "train.batch_schedule=[{after: 0.5, batch_tokens: 512}]",
        "checkpoint.keep=9",
    ]


def test_learning_rate_tokens_and_corpora_follow_the_stages(
    muonscale: Muonscale, staged: list[str], tmp_path: Path
) -> None:
    answer = muonscale("train", *staged, "optimizer.lr=0.01")
    assert answer.code == 0, answer.err
    steps = metrics(tmp_path / "run", "train")
    assert [r["tokens"] for r in steps[14:18]] == [3840, 4096, 4608, 5120]
    assert steps[-1]["tokens"] == 8192 and len(steps) == 24
    rates = [r["lr"]["hidden"] for r in steps]
    assert rates[:8] == pytest.approx([0.01 * (i + 1) / 9 for i in range(8)])
    half = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (4096 - 2048) / (6144 - 2048)))
    assert rates[16] == pytest.approx(0.01 * half)
    assert rates[20] == pytest.approx(0.005) and rates[23] == pytest.approx(0.005 / 4)
    corpora = json.loads((tmp_path / "run" / "env.json").read_text())["data"]
    # 64 sequences of 3:1, 128 of code alone, 64 of 1:3
    assert corpora["code"]["read"]["tokens"] == (48 + 128 + 16) * 32
    assert corpora["prose"]["read"]["share"] == (16 + 48) / 256
    assert "code: " in answer.out and "25.0 % of the run" in answer.out
    assert "256, from step 16 on 512 tokens" in answer.out


def test_validation_losses_are_distinguished(
    muonscale: Muonscale, staged: list[str], tmp_path: Path
) -> None:
    assert muonscale("train", *staged).code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    config = load_config(str(tmp_path / "run"))
    corpora = prepare(config.data, seed=0, report=lambda *report: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for name, corpus in corpora.items():
        rows = Sequences(corpus.validation, 32)
        loss, _ = loss_on_batches(model, [rows.batch(range(len(rows)))])  # type: ignore[arg-type]
        assert result["validation_losses"][name] == pytest.approx(loss, rel=1e-5)
    assert result["validation_loss_se"] is None  # one document in each corpus
    both = result["validation_losses"]
    assert result["validation_loss"] == pytest.approx(0.75 * both["code"] + 0.25 * both["prose"])


def test_a_staged_run_resumes_exactly(
    muonscale: Muonscale, staged: list[str], tmp_path: Path
) -> None:
    assert muonscale("train", *staged).code == 0
    run = tmp_path / "run"
    before, losses = weights(run), [r["loss"] for r in metrics(run, "train")]
    for step in (5, 15, 20):  # in the first stage, before the batch grows, as the last one begins
        shutil.copytree(run, tmp_path / "copy", dirs_exist_ok=True)
        (tmp_path / "copy" / "result.json").unlink()
        for folder in (tmp_path / "copy" / "checkpoints").iterdir():
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
        answer = muonscale("train", tmp_path / "copy", "--resume")
        assert answer.code == 0 and f"at step {step} of 24" in answer.out
        assert weights(tmp_path / "copy") == before
        assert [r["loss"] for r in metrics(tmp_path / "copy", "train")] == losses


def test_a_dry_run_shows_the_stages(muonscale: Muonscale, staged: list[str]) -> None:
    answer = muonscale("train", *staged, "--dry-run")
    assert answer.code == 0, answer.err
    assert "stage 3    steps 20 to 24" in answer.out and "75 % prose" in answer.out


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("schedule.stages.1.weights={cod: 1}", "'cod'"),
        ("schedule.stages.1.weights={code: 0}", "all weights are 0"),
        ("schedule.stages.3.peak=1", "3 is none of the 3 items"),
        ("data.mixture.0.weight=-1", "data.mixture.0.weight=-1"),
        ("data.mixture.0.wait=1", "unknown key data.mixture.0.wait"),
        ("data.mixture.1.name=code", "'code'"),
        ("data.mixture.1.source=python-stdlib", "data.mixture.N.source, data.mixture.N.path"),
        ("train.batch_schedule.0.after=9000", "train.batch_schedule: 9,000 is not after"),
        ("train.batch_schedule.0.batch_tokens=100", "train.batch_schedule.0.batch_tokens=100"),
    ],
)
def test_mistakes_are_named(muonscale: Muonscale, staged: list[str], word: str, found: str) -> None:
    refused(muonscale("train", *staged, word, "--dry-run"), found)


def test_steps_cannot_have_a_batch_that_follows_tokens(muonscale: Muonscale) -> None:
    words = [
        "train.steps=5",
        "train.batch_schedule=[{after: 0.5, batch_tokens: 8192}]",
        "--dry-run",
    ]
    refused(muonscale("train", "demo", *words), "train.steps=5")


def test_a_corpus_that_no_stage_reads_is_refused(muonscale: Muonscale, staged: list[str]) -> None:
    words = ["data.mixture.1.weight=0", "schedule.stages.2.weights={code: 1}", "--dry-run"]
    refused(muonscale("train", *staged, *words), "'prose' has weight 0 in every stage")
