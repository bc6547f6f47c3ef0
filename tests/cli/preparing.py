"""Processes that prepare data in small shards, slowly, so that they can be interrupted."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

SHARD_BYTES = 12_000
PATIENCE = 600
"""Seconds that a process may take to get somewhere."""

# Python imports a module of this name whenever it starts: also in the processes that ours start.
SITE = f"""
import os, pathlib, sys, time
if "muonscale.lab.data.encode_chunk" not in sys.orig_argv:
    from muonscale.lab.data import document_store, encode
    document_store.PIECE_BYTES = 2000
    encode.CHUNK_BYTES, encode.PARALLEL_BYTES = {SHARD_BYTES}, 1
replace = pathlib.Path.replace
def replace_slowly(self, target):
    if target.suffix == ".bin":
        time.sleep(float(os.environ.get("SECONDS_A_SHARD", 0)))
        while target.name.startswith("train") and target.name >= os.environ.get("HELD_FROM", "z"):
            if pathlib.Path(__file__).with_name("go-on").exists():
                break
            time.sleep(0.2)
    return replace(self, target)
pathlib.Path.replace = replace_slowly
"""


def start(
    *words: object, site: Path, seconds: float = 0.0, held: str = "z"
) -> subprocess.Popen[str]:
    """Start `muonscale` so that every shard has 12 kB of text and takes some seconds more.

    Shards from the name `held` on are not written before `go_on`.
    """
    (site / "sitecustomize.py").write_text(SITE)
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "muonscale", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "SECONDS_A_SHARD": str(seconds), "HELD_FROM": held},
    )


@contextmanager
def started(
    *words: object, site: Path, seconds: float = 0.0, held: str = "z"
) -> Generator[subprocess.Popen[str]]:
    """Start `muonscale` as `start` does, and leave nothing behind."""
    with start(*words, site=site, seconds=seconds, held=held) as process:
        try:
            yield process
        finally:
            process.kill()


def go_on(site: Path) -> None:
    """Let the processes of a site write the shards that are held."""
    (site / "go-on").touch()


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    """Return what a process has printed, when it has ended with a code."""
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == code, output
    return output


def wait_for(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Wait until something is so; fail if the process ends before."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit, "the process does not get there"
        time.sleep(0.01)


def training_shards(cache: Path) -> int:
    """Return how many shards of the training split are written."""
    return sum(1 for _ in cache.rglob("train-*.bin"))


def helper(process: subprocess.Popen[str], module: str, rng: random.Random) -> psutil.Process:
    """Return a process below one that runs a module of `muonscale.lab.data`."""
    found = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if f"muonscale.lab.data.{module}" in child.cmdline()
    ]
    assert found, "there is none"
    return rng.choice(found)
