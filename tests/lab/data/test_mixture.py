"""Which corpus a sequence comes from."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonscale.lab.data.mixture import BLOCK, common_sequences, locate, plan_mixture, read_in_all

WEIGHTS = st.lists(st.floats(0.001, 100), min_size=2, max_size=32)


def test_shares_are_the_weights_after_every_block() -> None:
    weights, count = (7.0, 2.0, 1.0), 20 * BLOCK
    (stretch,) = plan_mixture([weights], [count])
    corpora, _ = locate([stretch], 0, count, seed=3)
    for end in range(BLOCK, count + 1, BLOCK):
        seen = np.bincount(corpora[:end], minlength=3)
        assert np.abs(seen - np.array(weights) / 10 * end).max() <= 2, end


@settings(deadline=None, max_examples=40)
@given(WEIGHTS, st.data())
def test_every_corpus_is_read_on_without_gaps(weights: list[float], data: st.DataObject) -> None:
    stages = [weights, data.draw(st.permutations(weights)), weights]
    ends = np.cumsum(data.draw(st.lists(st.integers(1, 4000), min_size=3, max_size=3)))
    stretches = plan_mixture(stages, ends.tolist())
    corpora, positions = locate(stretches, 0, int(ends[-1]), seed=1)
    for number in range(len(weights)):
        mine = positions[corpora == number]
        assert np.array_equal(mine, np.arange(read_in_all(stretches)[number]))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=10))
def test_any_batch_sizes_read_the_same(batches: list[int]) -> None:
    stretches = plan_mixture([(1.0, 2.0), (3.0, 1.0)], [2500, 7000])
    whole = locate(stretches, 0, sum(batches), seed=5)
    position, parts = 0, []
    for batch in batches:
        parts.append(locate(stretches, position, batch, seed=5))
        position += batch
    for one, two in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.array_equal(one, np.concatenate(two))


def test_the_weights_change_where_a_stage_ends() -> None:
    stretches = plan_mixture([(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)], [300, 500, 2500])
    corpora, positions = locate(stretches, 0, 2500, seed=0)
    assert not corpora[:300].any() and corpora[300:500].all()
    assert np.bincount(corpora[500:]).tolist() == [1000, 1000]
    assert read_in_all(stretches) == (1300, 1200)
    assert positions[:300].tolist() == list(range(300))


def test_a_longer_run_begins_as_a_shorter_one() -> None:
    short = plan_mixture([(0.4, 0.6)], [5 * BLOCK])
    long = plan_mixture([(0.4, 0.6)], [50 * BLOCK])
    for one, two in zip(locate(short, 0, 4 * BLOCK, 9), locate(long, 0, 4 * BLOCK, 9), strict=True):
        assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("ends", "longer", "common"),
    [
        ([3 * BLOCK + 7], [5 * BLOCK], 2 * BLOCK),  # the last block takes the remainder too
        ([7], [9], 0),
        ([BLOCK, 2 * BLOCK], [BLOCK, 4 * BLOCK], 2 * BLOCK),
        ([BLOCK, 2 * BLOCK], [BLOCK + 9, 4 * BLOCK], 0),
        ([BLOCK], [BLOCK, 3 * BLOCK], BLOCK),
    ],
)
def test_two_lengths_of_a_run_read_the_same_up_to(
    ends: list[int], longer: list[int], common: int
) -> None:
    weights = [(0.7, 0.3), (0.2, 0.8)]
    plans = [plan_mixture(weights[: len(each)], each) for each in (ends, longer)]
    assert common_sequences(*plans) == common
    one, other = (locate(plan, 0, min(ends[-1], longer[-1]), 0) for plan in plans)
    same = (one[0] == other[0]) & (one[1] == other[1])
    assert same[:common].all()
    assert common == len(same) or not same[common:].all()


def test_corpora_are_shuffled_and_the_seed_counts() -> None:
    stretches = plan_mixture([(1.0, 1.0)], [BLOCK])
    one, _ = locate(stretches, 0, BLOCK, 0)
    two, _ = locate(stretches, 0, BLOCK, 1)
    assert 0.4 < (one == two).mean() < 0.6
    assert 0.4 < (one[1:] == one[:-1]).mean() < 0.6


def test_weights_are_exact() -> None:
    (stretch,) = plan_mixture([(0.1, 0.2)], [10])
    assert stretch.shares[0] == Fraction(0.1) / (Fraction(0.1) + Fraction(0.2))


def test_a_position_beyond_the_run_is_refused() -> None:
    with pytest.raises(IndexError, match="sequence 10"):
        locate(plan_mixture([(1.0, 1.0)], [10]), 8, 3, 0)
