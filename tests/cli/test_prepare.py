"""The verb `prepare`."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.cli.preparing import end, helper, start, started, training_shards, wait_for
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


def contents(cache: Path) -> dict[str, bytes]:
    """All files of the only corpus in a cache, but meta.json, which has times."""
    (folder,) = cache.glob("[!.nr]*")
    assert not list(cache.glob(".partial-*")), "something is left over"
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    found = {name: path.read_bytes() for name, path in files.items() if name != "meta.json"}
    return found | {"fingerprint": folder.name.encode()}


@pytest.fixture
def prepare_words(tiny: list[str]) -> list[str]:
    return ["prepare", *(word for word in tiny if not word.startswith("data.cache"))]


@pytest.mark.slow
def test_a_preparation_that_is_killed_at_random_moments_gives_the_same_shards(
    prepare_words: list[str], tmp_path: Path
) -> None:
    whole, cache, rng = tmp_path / "whole", tmp_path / "cache", random.Random(0)
    end(start(*prepare_words, f"data.cache={whole}", site=tmp_path))
    words = [*prepare_words, f"data.cache={cache}", "--processes", 2]
    killed = {"worker": 0, "main": 0}
    while (done := training_shards(cache)) < 12:
        with started(*words, site=tmp_path, seconds=0.5) as process:
            at = done + rng.randint(1, 3)
            wait_for(process, lambda at=at: training_shards(cache) >= at)
            if training_shards(cache) and killed["worker"] <= killed["main"]:
                helper(process, "encode_chunk", rng).kill()
                output = end(process, 2)
                assert "signal 9" in output and "to go on" in output, output
                killed["worker"] += 1
            else:
                killed["main"] += 1
        assert training_shards(cache) >= done
    assert min(killed.values()) >= 2
    output = end(start(*words, site=tmp_path))
    assert "reading" not in output.replace("reading\n", "", 1)
    assert contents(cache) == contents(whole) and len(contents(cache)) > 14


@pytest.mark.slow
def test_two_preparations_at_once_give_the_same_shards_also_if_one_is_killed(
    prepare_words: list[str], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    end(start(*prepare_words, f"data.cache={whole}", site=tmp_path))
    for number, seconds in enumerate((0.05, 0.3)):
        cache = tmp_path / f"cache{number}"
        words = [*prepare_words, f"data.cache={cache}", "--processes", 2]
        with (
            started(*words, site=tmp_path, seconds=seconds) as first,
            started(*words, site=tmp_path, seconds=seconds) as second,
        ):
            if number:
                wait_for(first, lambda cache=cache: training_shards(cache) >= 5)
                first.kill()
            else:
                assert str(cache) in end(first)
            assert str(cache) in end(second)
        if number:  # what the killed one left is kept for a day
            (left,) = cache.glob(".partial-*")
            shutil.rmtree(left)
        assert contents(cache) == contents(whole)
