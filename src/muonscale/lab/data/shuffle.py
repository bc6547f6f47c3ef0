"""The order of training sequences: each is computed from its position alone.

Every epoch is a permutation of all sequences that depends on (seed, epoch). It is computed, not
stored: a Feistel network is a bijection of the integers below a power of four, and walking its
cycle until the value falls below the number of sequences makes it a bijection of those
(Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, section 3). So a run resumes at
any position with any batch size or number of processes, and order takes no memory.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Four rounds make a Feistel network a strong pseudorandom permutation (Luby and Rackoff, 1988);
# the rest is for halves of a few bits. Assumption, tested by the spread of small permutations.
ROUNDS = 8


def sequence_indices(position: int, count: int, num_sequences: int, seed: int) -> NDArray[np.int64]:
    """Return which sequences come next.

    Args:
        position: sequences consumed since the start of training, over all epochs.
        count: how many indices to return; the range may cross epochs.
        num_sequences: sequences of the corpus, at least 1.
        seed: seed of the order; any integer.

    Returns:
        Indices in range(num_sequences), int64, shape [count].

    Raises:
        ValueError: for a negative position or count, or no sequences.

    Examples:
        >>> sequence_indices(0, 6, 3, seed=0).tolist()
        [0, 1, 2, 2, 1, 0]
    """
    if position < 0 or count < 0 or num_sequences < 1:
        raise ValueError(f"position={position}, count={count}, num_sequences={num_sequences}")
    return indices_at(np.arange(position, position + count), num_sequences, seed)


def indices_at(positions: NDArray[np.int64], num_sequences: int, seed: int) -> NDArray[np.int64]:
    """Return which sequences are at some positions, in any order; else as `sequence_indices`."""
    epochs, within = np.divmod(positions, num_sequences)
    found = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = permute(within[here], num_sequences, f"{seed}:{epoch}")
    return found


def permute(values: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """Apply the permutation of range(size) that a key names to some of its numbers."""
    keys = _round_keys(key)
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    numbers = _feistel(values.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(numbers >= size)
    while outside.size:  # below four tries on average: the domain is under 4 * size
        numbers[outside] = _feistel(numbers[outside], half_bits, keys)
        outside = outside[numbers[outside] >= size]
    return numbers.astype(np.int64)


def _round_keys(key: str) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(
    values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[Any]) -> NDArray[Any]:
    """Scramble 64-bit integers (the finalizer of SplitMix64: Steele et al., OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
