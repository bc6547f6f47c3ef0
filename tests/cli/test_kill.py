"""kill -9 at random moments, then --resume: the weights are those of an uninterrupted run."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Muonscale

Kill = Callable[[list[str], Path, random.Random], None]


def start(words: list[str], run: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "muonscale", "train", *words, f"run.path={run}", *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def kill_while_it_trains(words: list[str], run: Path, rng: random.Random) -> None:
    """Start the run and kill it when it has recorded one of its first steps, or a little later."""
    process, step = start(words, run), rng.randrange(5, 20)
    while process.poll() is None and recorded(run) < step:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    process.communicate()


def recorded(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


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
    ("kills", "steps", "kill", "more"),
    [
        pytest.param(1, 40, kill_while_it_trains, [], id="1-kills"),
        pytest.param(20, 150, kill_at_random, [], id="20-kills", marks=pytest.mark.slow),
        pytest.param(
            8,
            150,
            kill_at_random,
            ["checkpoint.background=true", "checkpoint.every=2"],
            id="8-kills-in-the-background",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_run_ends_with_the_same_weights(
    kills: int,
    steps: int,
    kill: Kill,
    more: list[str],
    muonscale: Muonscale,
    tiny: list[str],
    tmp_path: Path,
) -> None:
    """What is killed is a process of its own; the rest is done in this one, which has imported torch."""
    words = [*tiny, f"train.steps={steps}", "checkpoint.every=7", "eval.every=20"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    answer = muonscale("train", *words, f"run.path={whole}")
    assert answer.code == 0, answer.err
    words += more
    rng = random.Random(kills)
    for _ in range(kills):
        kill(words, killed, rng)
    answer = muonscale("train", *words, f"run.path={killed}", "--resume")
    assert answer.code == 0, answer.err
    names = ["model/model.safetensors", "model/tokenizer.json", "model/config.json"]
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert losses(killed) == losses(whole)
    assert (
        json.loads((killed / "result.json").read_text())["validation_loss"]
        == (json.loads((whole / "result.json").read_text())["validation_loss"])
    )
