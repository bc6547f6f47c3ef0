"""The average of the weights and the schedules of options, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor

from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.checkpoint import folder_name, load_tensors
from tests.conftest import Muonscale, tiny_words, train_shared

OPTIONS = json.dumps(
    {
        "momentum": [{"at": 0, "value": 0.85}, {"at": 5, "value": 0.95}],
        "embedding.weight_decay": [{"at": 0, "times": 1}, {"at": "end", "times": 0}],
    }
)
WORDS = [
    "checkpoint.every=1",
    "checkpoint.keep=20",
    "train.average_from=0.5",
    f"schedule.options={OPTIONS}",
]


@pytest.fixture(scope="module", params=["ema", "mean"])
def averaged(
    request: pytest.FixtureRequest,
    corpus_file: Path,
    cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("average") / "run"
    words = [*WORDS, f"train.average={request.param}", "train.average_decay=0.7"]
    train_shared(*tiny_words(folder, corpus_file, cache), *words)
    yield request.param, folder


def of_step(run: Path, step: int, kind: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, `model` or `average`."""
    like = load_file(run / "model" / "model.safetensors")
    found = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    load_tensors(run / "checkpoints" / folder_name(step), {kind: found}, Processes())
    return found


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


def test_the_average_is_that_of_the_weights_of_the_last_steps(averaged: tuple[str, Path]) -> None:
    rule, run = averaged
    weights = {step: of_step(run, step, "model") for step in range(6, 13)}
    for name, tensor in of_step(run, 12, "average").items():
        own = [weights[step][name] for step in range(6, 13)]
        expected = torch.stack(own).mean(0)
        if rule == "ema":
            expected = own[0]
            for later in own[1:]:
                expected = 0.7 * expected + 0.3 * later
        torch.testing.assert_close(tensor, expected)
    exported = load_file(run / "model-average" / "model.safetensors")
    for name, tensor in of_step(run, 12, "average").items():
        assert torch.equal(exported[name], tensor)
        assert not torch.equal(tensor, weights[12][name])


def test_it_is_evaluated_beside_the_weights(averaged: tuple[str, Path]) -> None:
    _, run = averaged
    before, *after = records(run, "eval")
    assert "average_validation_loss" not in before
    assert all("average_validation_loss" in record for record in after)
    result = json.loads((run / "result.json").read_text())
    card = ModelCard.load(run / "model-average" / "README.md").text
    assert f"{result['average_validation_loss']:.4f}" in card
    assert result["average_validation_loss"] != result["validation_loss"]


def test_a_resumed_run_ends_with_the_same_average(
    muonscale: Muonscale, averaged: tuple[str, Path], tmp_path: Path
) -> None:
    _, run = averaged
    again = Path(shutil.copytree(run, tmp_path / "again"))
    for path in ("result.json", "model", "model-average"):
        target = again / path
        target.unlink() if target.is_file() else shutil.rmtree(target)
    for step in range(9, 13):
        shutil.rmtree(again / "checkpoints" / folder_name(step))
    answer = muonscale("train", again, "--resume")
    assert answer.code == 0, answer.err
    for folder in ("model", "model-average"):
        file = Path(folder) / "model.safetensors"
        assert (again / file).read_bytes() == (run / file).read_bytes()
    shown = [record["options"] for record in records(run, "train")]
    assert [record["options"] for record in records(again, "train")] == shown


def test_the_average_of_a_checkpoint_is_exported(
    muonscale: Muonscale, averaged: tuple[str, Path], tmp_path: Path
) -> None:
    _, run = averaged
    answer = muonscale("export", f"{run}@8", tmp_path / "at-8", "--average")
    assert answer.code == 0, answer.err
    exported = load_file(tmp_path / "at-8" / "model.safetensors")
    for name, tensor in of_step(run, 8, "average").items():
        assert torch.equal(exported[name], tensor)
    refused = muonscale("export", f"{run}@4", tmp_path / "at-4", "--average")
    assert refused.code == 2
    assert "no average of the weights" in refused.err


def test_options_follow_their_points(averaged: tuple[str, Path]) -> None:
    _, run = averaged
    shown = [record["options"] for record in records(run, "train")]
    for step, options in enumerate(shown):
        assert options["hidden.momentum"] == pytest.approx(0.85 + 0.02 * min(step, 5))
        assert options["embedding.weight_decay"] == pytest.approx(0.1 * (1 - step / 11))


def test_plan_counts_the_average(muonscale: Muonscale, tiny: list[str]) -> None:
    without, with_it = (
        json.loads(muonscale("plan", *tiny, *words, "--json").out)["memory"]["parts"]
        for words in ([], ["train.average=ema"])
    )
    assert with_it["average"] == with_it["parameters"]
    assert "average" not in without or without["average"] == 0


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("schedule.options={momentm: [{at: 0, value: 1}]}", "did you mean momentum"),
        ("schedule.options={lr: [{at: 0, value: 1}]}", "lr: learning rates"),
        ("schedule.options={momentum: [{at: 0}]}", "value"),
        ("schedule.options={momentum: [{at: 0, value: 0.9}, {at: 5, times: 1}]}", "one of both"),
        ("schedule.options={momentum: [{at: 5, value: 0.9}, {at: 5, value: 0.8}]}", "steps 5, 5"),
        ("schedule.options={momentum: [{at: 5, value: 1.9}]}", "momentum is 1.9"),
        ("schedule.options={hid.momentum: [{at: 5, value: 0.9}]}", "hidden"),
        ("schedule.options={momentum: []}", "at least 1"),
        ("train.average=median", "ema"),
        ("train.average_decay=1", "less than 1"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_done(
    muonscale: Muonscale, tiny: list[str], word: str, said: str
) -> None:
    for more in ([], ["--dry-run"]):
        answer = muonscale("train", *tiny, word, *more)
        assert answer.code == 2
        assert said in answer.err
