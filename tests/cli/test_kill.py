"""kill -9 at random moments, then --resume: the weights are those of an uninterrupted run."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 150


def start(words: list[str], run: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "muonscale", "train", *words, f"run.path={run}", *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def kill_at_random(words: list[str], run: Path, rng: random.Random) -> None:
    """Start or continue the run and kill it: once in four while it sets up, else while it trains."""
    began = time.time()
    process = start(words, run, "--resume")
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0, 6))
    else:
        while process.poll() is None and not is_newer(run / "env.json", began):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 1.2))
    process.kill()
    process.communicate()


def is_newer(path: Path, moment: float) -> bool:
    return path.exists() and path.stat().st_mtime > moment


@pytest.mark.parametrize(
    "kills", [1, pytest.param(20, marks=pytest.mark.slow)], ids=lambda n: f"{n}-kills"
)
def test_a_killed_run_ends_with_the_same_weights(
    kills: int, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, f"train.steps={STEPS}", "checkpoint.every=7", "eval.every=20"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output, _ = (process := start(words, whole)).communicate()
    assert process.returncode == 0, output
    rng = random.Random(kills)
    for _ in range(kills):
        kill_at_random(words, killed, rng)
    output, _ = (process := start(words, killed, "--resume")).communicate()
    assert process.returncode == 0, output
    names = ["model/model.safetensors", "model/tokenizer.json", "model/config.json"]
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert losses(killed) == losses(whole)
    assert (
        json.loads((killed / "result.json").read_text())["held_out_loss"]
        == (json.loads((whole / "result.json").read_text())["held_out_loss"])
    )
