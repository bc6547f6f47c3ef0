from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from muonscale.errors import DataError
from muonscale.lab.data import ngram
from muonscale.lab.data.ngram import fit_ngrams

VOCAB = 11


def random_batches(seed: int, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    # Squaring makes some ids frequent and leaves some unseen.
    return [(generator.random(shape) ** 2 * (VOCAB - 1)).astype(np.int64) for shape in shapes]


TRAIN = random_batches(0, [(3, 6), (1, 9), (2, 4)])
VALIDATION = [*random_batches(1, [(2, 6), (1, 4)]), np.array([[VOCAB - 1, VOCAB - 1, 0]])]


def slow_losses(train: list[np.ndarray], validation: list[np.ndarray]) -> tuple[float, float]:
    """Return the unigram and the bigram loss with dictionaries, one token at a time."""
    pairs = [(h, w) for b in train for row in b.tolist() for h, w in pairwise(row)]
    words, joint = Counter(w for _, w in pairs), Counter(pairs)
    context = Counter(h for h, _ in pairs)
    types = Counter(h for h, _ in joint)

    def unigram(w: int) -> float:
        return (words[w] + len(words) / VOCAB) / (len(pairs) + len(words))

    def bigram(h: int, w: int) -> float:
        if h not in context:
            return unigram(w)
        return (joint[h, w] + types[h] * unigram(w)) / (context[h] + types[h])

    asked = [(h, w) for b in validation for row in b.tolist() for h, w in pairwise(row)]
    one = -sum(math.log(unigram(w)) for _, w in asked) / len(asked)
    two = -sum(math.log(bigram(h, w)) for h, w in asked) / len(asked)
    return one, two


def test_losses_equal_those_of_dictionaries():
    ngrams = fit_ngrams(TRAIN, VOCAB)
    unigram, bigram = slow_losses(TRAIN, VALIDATION)
    assert ngrams.unigram_loss(VALIDATION) == pytest.approx(unigram, rel=1e-12)
    assert ngrams.bigram_loss(VALIDATION) == pytest.approx(bigram, rel=1e-12)


def test_probabilities_sum_to_one_after_every_token():
    ngrams = fit_ngrams(TRAIN, VOCAB)
    previous, target = np.divmod(np.arange(VOCAB * VOCAB), VOCAB)
    sums = ngrams.bigram_probabilities(previous, target).reshape(VOCAB, VOCAB).sum(axis=1)
    assert (ngrams.previous_counts == 0).any()  # the tokens never seen are among them
    np.testing.assert_allclose(sums, 1, rtol=1e-12)
    np.testing.assert_allclose(ngrams.unigram_probabilities().sum(), 1, rtol=1e-12)


def test_merging_in_small_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    train = random_batches(2, [(4, 30)] * 12)
    whole = fit_ngrams(train, VOCAB)
    monkeypatch.setattr(ngram, "PENDING_PAIRS", 5)
    chunked = fit_ngrams(train, VOCAB)
    for name in ("target_counts", "pair_keys", "pair_counts", "previous_counts", "follower_types"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(chunked, name))


def test_rows_are_not_joined_and_the_first_token_is_no_target():
    ngrams = fit_ngrams([np.array([[7, 1, 2], [5, 1, 3]])], VOCAB)
    assert np.flatnonzero(ngrams.target_counts).tolist() == [1, 2, 3]
    pairs = [divmod(key, VOCAB) for key in ngrams.pair_keys.tolist()]
    assert pairs == [(1, 2), (1, 3), (5, 1), (7, 1)]


def test_a_repeated_cycle_is_nearly_certain_for_the_bigram_model():
    cycle = np.tile(np.arange(VOCAB), 200)[None, :]
    ngrams = fit_ngrams([cycle], VOCAB)
    assert ngrams.unigram_loss([cycle]) == pytest.approx(math.log(VOCAB), abs=1e-3)
    assert ngrams.bigram_loss([cycle]) < 0.01


def test_a_large_vocabulary_takes_memory_by_pairs_seen():
    batch = np.random.default_rng(0).integers(0, 130_000, (8, 513))
    ngrams = fit_ngrams([batch], 130_000)
    assert ngrams.pair_counts.sum() == 8 * 512
    assert len(ngrams.pair_keys) <= 8 * 512
    assert ngrams.bigram_loss([batch]) < ngrams.unigram_loss([batch])


@pytest.mark.parametrize("batches", [[], [np.zeros((4, 1), np.int64)]])
def test_nothing_to_count_or_to_predict_is_refused(batches: list[np.ndarray]):
    with pytest.raises(DataError, match="got 0"):
        fit_ngrams(batches, VOCAB)
    with pytest.raises(DataError, match="0 targets"):
        fit_ngrams(TRAIN, VOCAB).bigram_loss(batches)


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_ids_outside_the_vocabulary_are_refused(bad: int):
    with pytest.raises(DataError, match=r"must be in \[0, 11\), found"):
        fit_ngrams([np.array([[0, bad]])], VOCAB)
    with pytest.raises(DataError, match=r"must be in \[0, 11\), found"):
        fit_ngrams(TRAIN, VOCAB).unigram_loss([np.array([[bad, 0]])])
