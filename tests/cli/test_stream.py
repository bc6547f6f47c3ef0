"""Runs that begin while their corpus is prepared end with the weights of undisturbed ones."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.cli.jobs import checkpoints, job, losses, weights
from tests.cli.preparing import end, go_on, helper, start, started, training_shards, wait_for
from tests.conftest import Muonscale

STEPS = 40
MORE = ["data.stream=true", f"train.steps={STEPS}", "train.batch_tokens=1024", "checkpoint.every=7"]


@pytest.fixture
def words(tiny: list[str]) -> list[str]:
    """Words after `muonscale train` for a run that reads most of 16 shards."""
    kept = [word for word in tiny if not word.startswith(("data.cache", "run.path"))]
    return [*kept, *MORE]


def train_whole(muonscale: Muonscale, words: list[str], tmp_path: Path) -> Path:
    """The folder of a run that begins when its corpus is complete."""
    run, own = tmp_path / "whole", f"data.cache={tmp_path / 'complete'}"
    end(start("prepare", *words, own, site=tmp_path))
    answer = muonscale("train", *words, own, f"run.path={run}")
    assert answer.code == 0, answer.err
    assert "waits for shard" not in answer.out and "tokenizing" not in answer.out
    return run


@pytest.mark.slow
def test_a_run_that_is_streamed_and_killed_ends_with_the_same_weights(
    muonscale: Muonscale, words: list[str], tmp_path: Path
) -> None:
    expected, rng = train_whole(muonscale, words, tmp_path), random.Random(0)
    run, cache = tmp_path / "run", tmp_path / "cache"
    mine = [*words, f"run.path={run}", f"data.cache={cache}"]
    done = 0
    while done < 9:  # killed whenever more shards are there
        steps = len(losses(run))
        with started("train", *mine, "--resume", site=tmp_path, seconds=0.4) as process:
            wait_for(process, lambda steps=steps: len(losses(run)) >= min(steps + 3, STEPS - 4))
            at = done + rng.randint(3, 6)
            wait_for(process, lambda at=at: training_shards(cache) >= at)
            done = training_shards(cache)
    output = end(start("train", *mine, "--resume", site=tmp_path, seconds=0.4))
    assert "resuming" in output, output
    assert weights(run) == weights(expected)
    assert losses(run) == losses(expected)


@pytest.mark.slow
def test_a_run_waits_for_its_tokens_and_goes_on_when_the_writer_was_killed(
    muonscale: Muonscale, words: list[str], tmp_path: Path
) -> None:
    expected, rng = train_whole(muonscale, words, tmp_path), random.Random(0)
    run, cache = tmp_path / "run", tmp_path / "cache"
    mine = [*words, f"run.path={run}", f"data.cache={cache}"]
    with started("train", *mine, site=tmp_path, held="train-00002") as process:
        wait_for(process, lambda: len(losses(run)) >= 1)
        helper(process, "background", rng).kill()
        output = end(process, 2)
    assert "shard 3 of 14 is missing" in output, output
    assert f"muonscale train {run} --resume" in output, output
    stopped = len(losses(run))
    assert checkpoints(run)[-1] == stopped
    with started("train", run, "--resume", site=tmp_path, held="train-00006") as process:
        wait_for(process, lambda: len(losses(run)) > stopped)
        process.send_signal(signal.SIGTERM)
        output = end(process, 128 + signal.SIGTERM)
    assert f"muonscale train {run} --resume" in output, output
    end(start("train", run, "--resume", site=tmp_path))
    assert weights(run) == weights(expected) and losses(run) == losses(expected)


@pytest.mark.slow
def test_a_run_follows_a_preparation_that_another_process_does(
    muonscale: Muonscale, words: list[str], tmp_path: Path
) -> None:
    expected = train_whole(muonscale, words, tmp_path)
    run, cache = tmp_path / "run", tmp_path / "cache"
    mine = [*words, f"run.path={run}", f"data.cache={cache}"]
    with started("prepare", *mine, site=tmp_path, held="train-00004") as preparing:
        wait_for(preparing, lambda: training_shards(cache) >= 1)
        with started("train", *mine, site=tmp_path) as training:
            wait_for(training, lambda: len(losses(run)) >= 1)
            go_on(tmp_path)
            output = end(training)
        assert "waiting for a process that prepares the same data" in output, output
        assert "MB/s" in end(preparing)
    assert weights(run) == weights(expected) and losses(run) == losses(expected)


@pytest.mark.slow
def test_a_run_that_ends_first_ends_its_preparation(words: list[str], tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    mine = [*words, f"run.path={run}", f"data.cache={cache}", "train.steps=3"]
    output = end(start("train", *mine, site=tmp_path, held="train-00004"))
    assert "was stopped with the run" in output and "bigram" in output, output
    left = training_shards(cache)
    assert 1 <= left < 14
    assert not list(cache.glob("[!.nr]*"))
    end(start("prepare", *mine, site=tmp_path))
    assert training_shards(cache) > left


@pytest.mark.slow
def test_two_ranks_read_one_stream(
    muonscale: Muonscale, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*words, "optimizer.ns_dtype=float32", "train.steps=20"]
    expected = train_whole(muonscale, words, tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SECONDS_A_SHARD", "0.5")
    run, cache = tmp_path / "run", tmp_path / "cache"
    with job(2, [*words, f"run.path={run}", f"data.cache={cache}"]) as two:
        output = two.output()
    assert two.code == 0, output
    assert losses(run) == pytest.approx(losses(expected), rel=1e-4)
