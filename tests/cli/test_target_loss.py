"""Runs that end at a target loss, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from muonscale.lab.training import loop
from muonscale.lab.training.setup import Run
from muonscale.lab.training.signals import StopRequest
from tests.cli.jobs import checkpoints, records, weights
from tests.conftest import Muonscale


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def test_a_run_ends_at_its_target_with_the_weights_of_that_step(
    muonscale: Muonscale, tiny: list[str], trained_once: Path, tmp_path: Path
) -> None:
    at4, at8, _ = (record["validation_loss"] for record in records(trained_once, "eval"))
    run, target = tmp_path / "run", (at4 + at8) / 2
    answer = muonscale("train", *tiny, f"train.target_loss={target}")
    assert answer.code == 0, answer.err
    found = result(run)
    assert (found["step"], found["tokens"], found["target_reached"]) == (8, 8 * 256, True)
    assert found["validation_loss"] <= target == found["target_loss"]
    assert found["validation_tokens"] > 512  # on the whole split
    steps = records(run, "train")
    assert found["train_seconds"] * 1000 == sum(step["step_ms"] for step in steps)
    assert f"reached in 8 steps, 2,048 tokens, {found['train_seconds']:.1f} s" in answer.out
    losses = [[r["loss"] for r in records(each, "train")] for each in (run, trained_once)]
    assert losses[0] == losses[1][:8]
    assert checkpoints(run) == [5, 8]

    # It was killed before result.json was written.
    whole = weights(run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    answer = muonscale("train", run, "--resume")
    assert answer.code == 0, answer.err
    again = result(run)
    assert (again["step"], again["validation_loss"]) == (8, found["validation_loss"])
    assert weights(run) == whole and len(records(run, "train")) == 8

    # With a lower target the same run goes on, to the weights of an undisturbed one.
    (run / "result.json").unlink()
    answer = muonscale("train", run, "--resume", "train.target_loss=0.5")
    assert answer.code == 0, answer.err
    assert "0.5 not reached in 12 steps" in answer.out
    assert result(run)["target_reached"] is False
    assert weights(run) == weights(trained_once)


def test_a_sample_below_the_target_does_not_end_a_run_whose_split_is_above(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(run: Run, stop: StopRequest, **options: Any) -> dict[str, Any]:
        losses = {4: 4.9, 8: 4.8} if "sequences" in options else {4: 5.1, 8: 5.0}
        return {"kind": "eval", "step": run.state.step, "tokens": 256 * run.state.step,
                "validation_loss": losses[run.state.step], "bits_per_byte": 1.0}  # fmt: skip

    monkeypatch.setattr(loop, "measure_validation", measure)
    answer = muonscale("train", *tiny, "train.target_loss=5", "eval.sample_tokens=0")
    assert answer.code == 0, answer.err
    assert "step 4/12  validation loss 5.1000 on the whole split, above" in answer.out
    found = result(tmp_path / "run")
    assert (found["step"], found["validation_loss"], found["target_reached"]) == (8, 5.0, True)
