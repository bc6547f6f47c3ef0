"""Which corpus every sequence of a run comes from, as a function of one integer.

The sequences of a stage are dealt out in blocks of 1024. What a block takes of each corpus follows
from the weights alone, so that after every block a corpus has had its share to within a sequence;
the order within a block is a keyed permutation. A corpus is read on from stage to stage, in the order
of `order.py`, so that nothing of it is read twice before all was read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from muonscale.lab.data.shuffle import permute

BLOCK = 1024
"""Sequences; must hold one of every corpus and some to spare for the largest: see `_taken`."""


@dataclass(frozen=True)
class Stretch:
    """A part of a run in which the weights stay as they are."""

    first: int
    """Position of its first sequence, in sequences since the start of training."""
    count: int
    """Its sequences."""
    shares: tuple[Fraction, ...]
    """What part of them each corpus gives; they sum to 1."""
    offsets: tuple[int, ...]
    """Sequences of each corpus that were read before."""

    def taken(self, count: int) -> tuple[int, ...]:
        """Return how many of its first `count` sequences, a multiple of `BLOCK` or all, are of each."""
        return _taken(self.shares, count)


def _taken(shares: Sequence[Fraction], count: int) -> tuple[int, ...]:
    """Round down, and give the rest to the corpus with the largest share.

    From one multiple of `BLOCK` to a later end no figure falls: a small share rounded down never
    does, and the largest one takes at least BLOCK / corpora less one for each of the others.
    """
    largest = shares.index(max(shares))
    found = [int(share * count) for share in shares]
    found[largest] = 0
    found[largest] = count - sum(found)
    return tuple(found)


def plan_mixture(weights: Iterable[Sequence[float]], ends: Sequence[int]) -> tuple[Stretch, ...]:
    """Return the stretches of a run.

    Args:
        weights: of the corpora, for each stretch; not negative, at least one above 0.
        ends: sequences read until the end of each stretch, growing.
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
    """Return how many sequences of each corpus a run reads."""
    return _read_until_now(list(stretches))


def locate(
    stretches: Sequence[Stretch], position: int, count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the next sequences come from.

    Args:
        stretches: of the run.
        position: sequences consumed since the start of training.
        count: how many; all inside the run.
        seed: of the order.

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
            dealt = _deal(stretch, start, stop, f"{seed}:{number}:{start}")
            corpora.append(dealt[0][at - start : at - start + size])
            positions.append(dealt[1][at - start : at - start + size])
            at, position, count = at + size, position + size, count - size
    if count:
        raise IndexError(f"sequence {position} lies beyond the run")
    return np.concatenate(corpora), np.concatenate(positions)


def _block(count: int, at: int) -> tuple[int, int]:
    """Return the ends of the block that a sequence is in; the last is longer, so that none is short."""
    blocks = max(1, count // BLOCK)
    number = min(at // BLOCK, blocks - 1)
    start = number * BLOCK
    return start, count if number == blocks - 1 else start + BLOCK


def _deal(
    stretch: Stretch, start: int, stop: int, key: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what `locate` does for a whole block."""
    before = np.array(stretch.taken(start))
    amounts = np.array(stretch.taken(stop)) - before
    slots = permute(np.arange(stop - start), stop - start, key)
    corpora = np.searchsorted(np.cumsum(amounts), slots, side="right")
    positions = np.empty(stop - start, dtype=np.int64)
    for corpus, (amount, first) in enumerate(zip(amounts, before, strict=True)):
        positions[corpora == corpus] = stretch.offsets[corpus] + first + np.arange(amount)
    return corpora, positions
