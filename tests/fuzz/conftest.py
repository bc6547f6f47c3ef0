from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.outcome import command

MOST_MEMORY = 2 * 2**30
"""Bytes that reading any input of these tests may take: the inputs have less than a megabyte."""


def peak_memory() -> int:
    """The most memory that this process had so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.fixture(autouse=True)
def bounded_memory(good_run: Path) -> Iterator[None]:
    """No damaged or hostile input makes a reader allocate what it does not have."""
    before = peak_memory()
    yield
    assert peak_memory() - before < MOST_MEMORY


@pytest.fixture(scope="session")
def good_run(corpus_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with a checkpoint of each."""
    run = tmp_path_factory.mktemp("good") / "run"
    found = command(
        "train", "demo", f"run.path={run}", "run.threads=1", "model.preset=llama-pico",
        f"data.path={corpus_file}", f"data.cache={cache}", "data.vocab_size=300",
        "data.sequence_length=32", "data.max_bytes=60000", "train.steps=2", "train.batch_tokens=64",
        "eval.every=1", "eval.tokens=64", "eval.batch_tokens=512", "eval.sample_tokens=4",
        "checkpoint.every=1",
    )  # fmt: skip
    assert found.code == 0, found.err
    return run
