"""Jobs of several processes, started by torchrun, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 300
"""Seconds that a job may take to get somewhere."""


class Job:
    """A run on several processes."""

    def __init__(self, size: int, words: list[str], *options: str) -> None:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={size}",
        ]
        self._process = subprocess.Popen(
            [*launcher, *options, "-m", "muonscale", "train", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so; fail if the job ends or takes too long before it is."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self._process.poll() is None, self.output()
            assert time.monotonic() < end, "the job does not get there"
            time.sleep(0.01)

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank."""
        for child in psutil.Process(self._process.pid).children(recursive=True):
            if child.environ().get("RANK") == str(number):
                return child
        raise AssertionError(f"there is no rank {number}")

    def signal(self, number: int) -> None:
        """Send a signal to the launcher, which passes it on."""
        self._process.send_signal(number)

    def output(self, patience: float = PATIENCE) -> str:
        """Return all that was printed, when the job has ended."""
        return self._process.communicate(timeout=patience)[0]

    @property
    def code(self) -> int:
        """Exit code of a job that has ended."""
        return self._process.wait(timeout=PATIENCE)

    def stop(self) -> None:
        """Leave nothing behind."""
        if self._process.poll() is None:
            for child in psutil.Process(self._process.pid).children(recursive=True):
                child.kill()
            self._process.kill()
        self._process.communicate()


@contextmanager
def job(size: int, words: list[str], *options: str) -> Generator[Job]:
    """Start a job, and end it with the block."""
    started = Job(size, words, *options)
    try:
        yield started
    finally:
        started.stop()


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the metrics of a kind; of a line that is being written, nothing."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return [record for record in found if record["kind"] == kind]


def losses(run: Path) -> list[float]:
    """Return the training losses, by step."""
    return [record["loss"] for record in records(run, "train")]


def checkpoints(run: Path) -> list[int]:
    """Return the steps that have a checkpoint."""
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*"))


def weights(run: Path) -> bytes:
    """Return the trained model's file."""
    return (run / "model" / "model.safetensors").read_bytes()
