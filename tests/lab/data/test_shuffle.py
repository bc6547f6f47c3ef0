"""The order of sequences is a permutation that any position and batch size agree on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonscale.lab.data.shuffle import sequence_indices

SIZES = st.integers(1, 400)
SEEDS = st.integers(-(2**40), 2**70)


@settings(deadline=None)  # a busy machine is no failure
@given(SIZES, SEEDS, st.integers(0, 5))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = sequence_indices(epoch * size, size, size, seed)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [65536, 65537, 200_003])
def test_large_epoch_is_a_permutation(size: int) -> None:
    assert np.array_equal(np.sort(sequence_indices(0, size, size, 1)), np.arange(size))


@settings(deadline=None)  # a busy machine is no failure
@given(SIZES, SEEDS, st.lists(st.integers(0, 150), min_size=1, max_size=8), st.integers(0, 2000))
def test_any_batch_sizes_give_the_same_order(
    size: int, seed: int, batches: list[int], start: int
) -> None:
    whole = sequence_indices(start, sum(batches), size, seed)
    position, parts = start, []
    for batch in batches:
        parts.append(sequence_indices(position, batch, size, seed))
        position += batch
    assert np.array_equal(np.concatenate(parts), whole)


def test_order_differs_between_epochs_and_seeds() -> None:
    first, second = np.split(sequence_indices(0, 200, 100, seed=0), 2)
    other = sequence_indices(0, 100, 100, seed=1)
    for one, two in ((first, second), (first, other), (second, other)):
        assert np.count_nonzero(one == two) < 10  # one on average for random permutations
    assert not np.array_equal(first, np.arange(100))


@pytest.mark.parametrize("size", [3, 10])
def test_every_sequence_comes_first_equally_often(size: int) -> None:
    trials = 3000
    firsts = [sequence_indices(0, 1, size, seed)[0] for seed in range(trials)]
    counts = np.bincount(firsts, minlength=size)
    chi_squared = float(((counts - trials / size) ** 2 / (trials / size)).sum())
    assert chi_squared < size - 1 + 5 * (2 * (size - 1)) ** 0.5


def test_neighbors_do_not_stay_neighbors() -> None:
    order = sequence_indices(0, 10_000, 10_000, seed=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 20


def test_order_is_frozen() -> None:
    # A changed order would silently break resuming runs of earlier versions.
    assert sequence_indices(0, 6, 3, seed=0).tolist() == [0, 1, 2, 2, 1, 0]
    assert sequence_indices(10**12, 4, 10**9 + 7, seed=5).tolist() == [
        958095115,
        83854026,
        810965336,
        603703026,
    ]


@pytest.mark.parametrize("bad", [(-1, 1, 3), (0, -1, 3), (0, 1, 0)])
def test_impossible_requests_are_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="num_sequences"):
        sequence_indices(*bad, seed=0)
