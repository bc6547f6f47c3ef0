"""Which corpus each sequence of a run comes from, computed from its position alone.

The sequences of a stage come in blocks of 1024. The number of sequences of each corpus in a block
follows from the weights alone, so that after every block the share of a corpus is exact to within
one sequence. The order within a block is a keyed permutation. The stages read a corpus on, in the
order of `shuffle.py`, so that nothing of it is read twice before all of it was read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from muonscale.lab.data.shuffle import permute

BLOCK = 1024
"""Sequences of a block; it must exceed the number of corpora, see `_taken`."""


@dataclass(frozen=True)
class Stretch:
    """A part of a run with constant weights."""

    first: int
    """Position of its first sequence, in sequences since the start of training."""
    count: int
    """Number of its sequences."""
    shares: tuple[Fraction, ...]
    """Share of each corpus; the shares sum to 1."""
    offsets: tuple[int, ...]
    """Sequences of each corpus that were read before this stretch."""

    def taken(self, count: int) -> tuple[int, ...]:
        """Return each corpus's number of the first `count` (all, or n*BLOCK) sequences."""
        return _taken(self.shares, count)


def _taken(shares: Sequence[Fraction], count: int) -> tuple[int, ...]:
    """Round every share down, and give the rest to the corpus with the largest share.

    No number decreases from one multiple of `BLOCK` to the next: a share rounded down never does,
    and the largest one grows by at least BLOCK / corpora less one for each of the others.
    """
    largest = shares.index(max(shares))
    found = [int(share * count) for share in shares]
    found[largest] = 0
    found[largest] = count - sum(found)
    return tuple(found)


def plan_mixture(weights: Iterable[Sequence[float]], ends: Sequence[int]) -> tuple[Stretch, ...]:
    """Return the stretches of a run.

    Args:
        weights: weights of the corpora in each stretch; not negative, at least one above 0.
        ends: sequences read until the end of each stretch, increasing.
    """
    stretches: list[Stretch] = []
    first = 0
    for stage, end in zip(weights, ends, strict=True):
        exact = [Fraction(weight) for weight in stage]
        shares = tuple(weight / sum(exact) for weight in exact)
        offsets = _read_until_now(stretches) if stretches else (0,) * len(shares)
        stretches.append(Stretch(first, end - first, shares, offsets))
        first = end
    return tuple(stretches)


def _read_until_now(stretches: list[Stretch]) -> tuple[int, ...]:
    last = stretches[-1]
    return tuple(o + n for o, n in zip(last.offsets, last.taken(last.count), strict=True))


def read_in_all(stretches: Sequence[Stretch]) -> tuple[int, ...]:
    """Return the number of sequences of each corpus that a run reads."""
    return _read_until_now(list(stretches))


def locate(
    stretches: Sequence[Stretch], position: int, count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the next sequences come from.

    Args:
        stretches: the stretches of the run.
        position: sequences read since the start of training.
        count: number of sequences, all inside the run.
        seed: seed of the order.

    Returns:
        The number of the corpus, and the position in its own order, of each: int64 `[count]`.

    Raises:
        IndexError: for positions beyond the run.
    """
    corpora, positions = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, stretch in enumerate(stretches):
        at, end = position - stretch.first, min(position + count - stretch.first, stretch.count)
        while 0 <= at < end:
            start, stop = _block(stretch.count, at)
            size = min(end, stop) - at
            block = _locate_block(stretch, start, stop, f"{seed}:{number}:{start}")
            corpora.append(block[0][at - start : at - start + size])
            positions.append(block[1][at - start : at - start + size])
            at, position, count = at + size, position + size, count - size
    if count:
        raise IndexError(f"sequence {position} is beyond the run")
    return np.concatenate(corpora), np.concatenate(positions)


def _block(count: int, at: int) -> tuple[int, int]:
    """Return start and end of the block of a sequence; the last block takes the remainder too."""
    blocks = max(1, count // BLOCK)
    number = min(at // BLOCK, blocks - 1)
    start = number * BLOCK
    return start, count if number == blocks - 1 else start + BLOCK


def _locate_block(
    stretch: Stretch, start: int, stop: int, key: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return corpus and position, as `locate` does, for a whole block."""
    before = np.array(stretch.taken(start))
    amounts = np.array(stretch.taken(stop)) - before
    slots = permute(np.arange(stop - start), stop - start, key)
    corpora = np.searchsorted(np.cumsum(amounts), slots, side="right")
    positions = np.empty(stop - start, dtype=np.int64)
    for corpus, (amount, first) in enumerate(zip(amounts, before, strict=True)):
        positions[corpora == corpus] = stretch.offsets[corpus] + first + np.arange(amount)
    return corpora, positions
