"""What a step reads."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from muonscale.lab.config.run_length import Timeline
from muonscale.lab.data.mixture import plan_mixture
from muonscale.lab.data.tokens import Sequences, TokenStore, TokenWriter
from muonscale.lab.training.batches import Batches

LENGTH = 4


def corpus(folder: Path, first: int, sequences: int) -> Sequences:
    """Return sequences of the numbers from `first` on."""
    folder.mkdir()
    with TokenWriter(folder, "train", np.dtype("<u2")) as writer:
        writer.write(np.arange(first, first + sequences * LENGTH + 1))
    return Sequences(TokenStore(folder, "train", np.dtype("<u2")), LENGTH)


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    """Two corpora, of 50 and 30 sequences; 20 steps of 4 of the first, then 10 of 8 of both."""
    train = {"a": corpus(tmp_path / "a", 0, 50), "b": corpus(tmp_path / "b", 1000, 30)}
    timeline = Timeline.changing(160 * LENGTH, 4, [(0.5, 8)], LENGTH)
    return Batches(
        train,
        train,
        {"a": 0.75, "b": 0.25},
        timeline,
        plan_mixture([(1, 0), (1, 3)], [80, 160]),
        evaluation_size=8,
        seed=0,
    )


def test_steps_read_what_the_stages_say(batches: Batches) -> None:
    rows = [batches.at(step) for step in range(30)]
    assert [len(row) for row in rows] == [4] * 20 + [8] * 10
    read = np.concatenate(rows)
    assert np.array_equal(read[:, 1:] - read[:, :-1], np.ones((160, LENGTH)))  # whole sequences
    first, second = read[:80, 0], read[80:, 0]
    assert (first < 1000).all()
    assert (second >= 1000).sum() == 60 and (second < 1000).sum() == 20
    # a: two epochs of 50, all in the first before any again; b: two of 30
    ours = read[read[:, 0] < 1000][:, 0]
    assert len(set(ours[:50])) == 50 and len(set(ours[50:80])) == 30
    assert batches.share("a") == {"tokens": 400, "share": 100 / 160, "epochs": 2.0}
    assert batches.share("b") == {"tokens": 240, "share": 60 / 160, "epochs": 2.0}


def test_ranks_share_every_batch(batches: Batches) -> None:
    shares = [replace(batches, rank=rank, ranks=4) for rank in range(4)]
    for step in (0, 19, 20, 29):
        parts = np.concatenate([share.at(step) for share in shares])
        assert np.array_equal(parts, batches.at(step))


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("at_most", [1, 40, 1000])
def test_a_sample_is_spread_over_each_corpus_by_weight(
    batches: Batches, weight: float, at_most: int
) -> None:
    weighted = replace(batches, weights={"a": weight, "b": 1 - weight})
    rows = np.concatenate(list(weighted.sample(at_most=at_most)))
    first = rows[rows[:, 0] < 1000][:, 0], rows[rows[:, 0] >= 1000][:, 0] - 1000
    total = min(at_most, 80)
    for starts, share, size in zip(first, (weight, 1 - weight), (50, 30), strict=True):
        assert len(starts) == math.ceil(share * total)
        numbers = np.bincount((starts // LENGTH).astype(int), minlength=size)
        assert len(starts) == 0 or numbers.max() - numbers.min() <= 1  # none twice before all once
        assert np.diff(numbers.nonzero()[0]).max(initial=1) <= math.ceil(size / max(1, len(starts)))


def test_the_mean_is_weighted_as_the_mixture(batches: Batches) -> None:
    assert batches.mean({"a": 2.0, "b": 4.0}) == pytest.approx(2.5)
    only = replace(batches, weights={"a": 1.0, "b": 0.0})
    assert only.mean({"a": 2.0, "b": float("nan")}) == 2.0


def test_the_error_of_the_mean_adds_the_weighted_errors_in_squares(batches: Batches) -> None:
    halves = replace(batches, weights={"a": 0.5, "b": 0.5})
    assert halves.mean_error({"a": 0.6, "b": 0.8}) == pytest.approx(0.5)
    assert halves.mean_error({"a": 0.6, "b": None}) is None
    only = replace(batches, weights={"a": 1.0, "b": 0.0})
    assert only.mean_error({"a": 0.3, "b": None}) == pytest.approx(0.3)
