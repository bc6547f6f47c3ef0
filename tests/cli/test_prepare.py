"""The verb `prepare`: alone, killed at any moment, and twice at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Muonscale


def test_training_begins_with_what_was_prepared(
    tiny: list[str], cache: Path, tmp_path: Path, muonscale: Muonscale
) -> None:
    own = tmp_path / "own"
    words = [word if not word.startswith("data.cache") else f"data.cache={own}" for word in tiny]
    found = muonscale("prepare", *words, "--processes", 2)
    assert found.code == 0, found.err
    assert "tokens for training" in found.out and "MB/s" in found.out
    assert str(own) in found.out and not (tmp_path / "run").exists()
    again = muonscale("prepare", *words)
    assert "tokenizing" not in again.out
    assert muonscale("prepare", *words, "train.stepz=1").code == 2


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Some 40 MB of words."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(3000)]
    path = tmp_path / "corpus.txt"
    with path.open("w") as file:
        for _ in range(700):
            file.write(" ".join(rng.choice(words, 10_000)).replace(" a", "\na") + "\n")
    return path


def start(corpus: Path, cache: Path) -> subprocess.Popen[bytes]:
    words = [f"data.path={corpus}", f"data.cache={cache}", "data.vocab_size=400"]
    return subprocess.Popen(
        [sys.executable, "-m", "muonscale", "prepare", *words, "--processes", "2"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )


def shards(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob("[0-9a-f]*/*.bin")}


@pytest.mark.slow
def test_killed_at_random_moments_and_twice_at_once(corpus: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng()
    with start(corpus, tmp_path / "whole") as process:
        begun = time.monotonic()
    seconds = time.monotonic() - begun
    cache = tmp_path / "killed"
    for _ in range(4):
        with start(corpus, cache) as process:
            time.sleep(float(rng.uniform(0.2, 0.7) * seconds))
            process.kill()  # its workers notice that it is gone
    processes = [start(corpus, cache) for _ in range(2)]
    time.sleep(float(rng.uniform(0.1, 0.3) * seconds))
    os.killpg(processes[0].pid, signal.SIGKILL)
    processes.append(start(corpus, cache))
    assert [process.wait() for process in processes] == [-9, 0, 0]
    assert shards(cache) == shards(tmp_path / "whole") and len(shards(cache)) > 2
    assert not [path for path in cache.glob("*/*") if "partial" in path.name]
