"""The verb `prepare`."""

from __future__ import annotations

from pathlib import Path

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
