"""Unigram and bigram models of token ids: predictions from counts alone.

They are baselines of a trained model. A bigram model reads one token of context, so a language
model with a higher loss has not learned to use more than the last token.

Witten-Bell interpolation, where T(h) is the number of distinct tokens seen after h, T the number of
distinct tokens seen, N the number of tokens and V the vocabulary:

    P1(w)     = (c(w) + T / V) / (N + T)
    P(w | h)  = (c(h, w) + T(h) P1(w)) / (c(h) + T(h)),   and P1(w) for an h never seen

Witten & Bell 1991, The zero-frequency problem, IEEE Trans. Information Theory 37(4), method C;
interpolated as in Chen & Goodman 1998, TR-10-98, section 2.4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from muonscale.errors import DataError
from muonscale.lab.data.loss_mask import IDS, is_marked, pair_with_previous

# Pairs waiting to be merged into the table: 2**22 int64 keys and counts are 64 MiB.
PENDING_PAIRS = 2**22


@dataclass(frozen=True, kw_only=True)
class Ngrams:
    """Counts of tokens and of pairs of adjacent tokens."""

    target_counts: np.ndarray
    """int64 [V]: how often each token was a target."""
    pair_keys: np.ndarray
    """int64 [pairs], ascending: previous * V + target of every pair seen."""
    pair_counts: np.ndarray
    """int64 [pairs]: how often each pair was seen."""
    previous_counts: np.ndarray
    """int64 [V]: how often each token was the previous one, c(h)."""
    follower_types: np.ndarray
    """int64 [V]: how many distinct targets each token had, T(h)."""

    def unigram_probabilities(self) -> np.ndarray:
        """Return P1, float64 [V]."""
        vocab_size = len(self.target_counts)
        types = np.count_nonzero(self.target_counts)
        return (self.target_counts + types / vocab_size) / (self.target_counts.sum() + types)

    def bigram_probabilities(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Return P(target | previous), float64, for int64 ids of one shape."""
        keys = previous * len(self.target_counts) + target
        at = np.minimum(np.searchsorted(self.pair_keys, keys), len(self.pair_keys) - 1)
        pairs = np.where(self.pair_keys[at] == keys, self.pair_counts[at], 0)
        unigram = self.unigram_probabilities()[target]
        types, total = self.follower_types[previous], self.previous_counts[previous]
        seen = np.maximum(total + types, 1)
        return np.where(total > 0, (pairs + types * unigram) / seen, unigram)

    def unigram_loss(self, batches: Iterable[np.ndarray]) -> float:
        """Return the mean negative log probability of the targets, in nats per token.

        Args:
            batches: int64 [B, L+1] token ids in [0, V); the targets are positions 1 to L.

        Raises:
            DataError: if there are no targets, or an id is outside the vocabulary.
        """
        log_p = np.log(self.unigram_probabilities())
        return _mean_loss(log_p[target] for _, target in self._pairs(batches))

    def bigram_loss(self, batches: Iterable[np.ndarray]) -> float:
        """Return the mean negative log probability of the targets, in nats per token.

        Each target is predicted from the token before it.

        Args:
            batches: int64 [B, L+1] token ids in [0, V); the targets are positions 1 to L.

        Raises:
            DataError: if there are no targets, or an id is outside the vocabulary.
        """
        pairs = self._pairs(batches)
        return _mean_loss(np.log(self.bigram_probabilities(*pair)) for pair in pairs)

    def _pairs(self, batches: Iterable[np.ndarray]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        return (_split(batch, len(self.target_counts)) for batch in batches)


def fit_ngrams(batches: Iterable[np.ndarray], vocab_size: int) -> Ngrams:
    """Count the tokens and pairs of `batches`.

    Memory grows with the number of distinct pairs, about 16 bytes for each and three times that
    while the table is merged, whatever the number of batches.

    Args:
        batches: int64 [B, L+1] token ids in [0, vocab_size); positions 1 to L are targets.
        vocab_size: size of the vocabulary.

    Raises:
        DataError: if there are no targets, or an id is outside the vocabulary.
    """
    target_counts = np.zeros(vocab_size, np.int64)
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    merged = waiting = 0
    for batch in batches:
        previous, target = _split(batch, vocab_size)
        target_counts += np.bincount(target, minlength=vocab_size)
        pending.append(np.unique(previous * vocab_size + target, return_counts=True))
        waiting += len(pending[-1][0])
        if waiting > max(PENDING_PAIRS, merged):  # merging as it doubles keeps the work linear
            pending = [_merge(pending)]
            merged, waiting = len(pending[0][0]), 0
    if not target_counts.any():
        raise DataError(
            f"n-gram models need at least one training target, got {target_counts.sum()}"
        )
    keys, counts = _merge(pending)
    previous = keys // vocab_size
    return Ngrams(
        target_counts=target_counts,
        pair_keys=keys,
        pair_counts=counts,
        previous_counts=_sum_by(previous, counts, vocab_size),
        follower_types=np.bincount(previous, minlength=vocab_size),
    )


def _split(batch: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the previous tokens and the targets of a batch, each int64 [targets]."""
    ids = batch & IDS if is_marked(batch) else batch
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise DataError(f"token ids must be in [0, {vocab_size}), found {ids.min()} to {ids.max()}")
    return pair_with_previous(batch)


def _merge(tables: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    keys, where = np.unique(np.concatenate([k for k, _ in tables]), return_inverse=True)
    return keys, _sum_by(where, np.concatenate([c for _, c in tables]), len(keys))


def _sum_by(where: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    # bincount sums in float64: exact for counts below 2**53.
    return np.bincount(where, weights=counts, minlength=size).astype(np.int64)


def _mean_loss(log_probabilities: Iterable[np.ndarray]) -> float:
    total, tokens = 0.0, 0
    for log_p in log_probabilities:
        total -= float(log_p.sum())
        tokens += log_p.size
    if tokens == 0:
        raise DataError(
            f"the validation split has {tokens} targets; give more text, or a larger data.validation"
        )
    return total / tokens
