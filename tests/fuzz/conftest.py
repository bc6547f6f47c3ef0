from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.outcome import command


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
