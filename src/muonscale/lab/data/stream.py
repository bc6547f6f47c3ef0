"""A training split that is read while its shards are still written.

The rows are those of the finished corpus, and their order depends on the seed and on the shards
alone, whenever these were written. The shards are read in windows of 1, 2, 4, 8, 16, 16, ... in
their order, so that training begins with the first one. In the first epoch every window is a
permutation of its own. Later epochs are those of `shuffle`: all shards are there by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muonscale.errors import DataError
from muonscale.lab.data.shuffle import indices_at, permute
from muonscale.lab.data.tokens import Sequences, TokenStore, map_shard, shard_path
from muonscale.lab.files import is_locked

SPLIT = "train"
WINDOW = 16
"""Most shards of a window."""


def window_ends(shards: int) -> list[int]:
    """Return the number of shards before the end of every window.

    Examples:
        >>> window_ends(50)
        [1, 3, 7, 15, 31, 47, 50]
    """
    ends, end = [], 0
    for number in count():
        end += min(2**number, WINDOW)
        if end >= shards:
            return [*ends, shards]
        ends.append(end)
    raise AssertionError


@dataclass(frozen=True)
class Feed:
    """Where the shards of a corpus are, while a process writes them and afterwards."""

    shards: int
    """Number of the shards of the training split."""
    folder: Path
    """Folder of the finished corpus."""
    partial: Path
    """Folder that they are written in, which is renamed to `folder`."""
    lock: Path
    """File that the process that writes them has locked."""

    def find(self, number: int) -> Path | None:
        """Return the path of a shard, None if it is not written yet."""
        path = shard_path(self.partial if self.partial.is_dir() else self.folder, SPLIT, number)
        return path if path.exists() else None

    @property
    def is_written(self) -> bool:
        """Whether a process is writing the shards."""
        return is_locked(self.lock)


class StreamedStore(TokenStore):
    """The tokens of a training split as far as they are written; `len(store)` counts them.

    Args:
        feed: where the shards are.
        dtype: type on disk.
        limit: number above every value.
        estimate: about how many tokens the whole split has.
    """

    def __init__(self, feed: Feed, dtype: np.dtype[Any], limit: int, estimate: int) -> None:
        self.feed, self.estimate = feed, estimate
        super().__init__(feed.partial, SPLIT, dtype, limit)
        self.grow()

    def _paths(self) -> list[Path]:
        return []

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamedStore, (self.feed, self.dtype, self.limit, self.estimate)

    def grow(self) -> None:
        """Open the shards that have been written since, up to the first that has not been."""
        while (number := len(self._shards)) < self.feed.shards:
            path = self.feed.find(number)
            if path is None:
                return
            try:
                shard = map_shard(path, self.dtype)
            except DataError:
                if path.exists():
                    raise
                return  # its folder has just been renamed
            self._shards.append(shard)
            self._starts = np.append(self._starts, self._starts[-1] + shard.size)

    @property
    def is_complete(self) -> bool:
        """Whether all shards are open."""
        return self.shards == self.feed.shards

    @property
    def size(self) -> int:
        """Tokens of the whole split: an estimate until it is complete."""
        return len(self) if self.is_complete else max(len(self), self.estimate)

    def tokens_of(self, shards: int) -> int:
        """Return the number of tokens of the first shards, which must be open."""
        return int(self._starts[shards])

    def rows(self, length: int) -> StreamedSequences:
        """Return the stream cut into sequences of `length` inputs."""
        return StreamedSequences(self, length)


class StreamedSequences(Sequences):
    """The rows of a `StreamedStore`; `len(sequences)` counts those that can be read so far."""

    def __init__(self, store: StreamedStore, length: int) -> None:
        super().__init__(store, length)
        self.stream = store
        self._windows = window_ends(store.feed.shards)

    @property
    def size(self) -> int:
        """Rows of the whole split: an estimate until it is complete."""
        return max(1, (self.stream.size - 1) // self.length)

    def missing(self, end: int) -> int | None:
        """Return the number of the first shard that is missing for the positions below `end`.

        None if all are there. Positions count the rows since the start of training.

        Raises:
            DataError: if the whole split is too short for a row.
        """
        if self._ends()[-1] < end:
            self.stream.grow()
        if not self.stream.is_complete:
            return self.stream.shards if self._ends()[-1] < end else None
        if not len(self):
            raise DataError(
                f"the training split in {self.stream.folder} has {len(self.stream)} tokens; one "
                f"sequence needs data.sequence_length={self.length} + 1"
            )
        return None

    def order(self, position: int, count: int, seed: int) -> NDArray[np.int64]:
        """Return which rows come next, as `sequence_indices` does for a finished corpus.

        Raises:
            IndexError: for a position whose shards are missing, see `missing`.
        """
        if (missing := self.missing(position + count)) is not None:
            raise IndexError(f"row {position + count - 1} needs shard {missing}, which is missing")
        ends = self._ends()
        positions = np.arange(position, position + count)
        found = np.empty(count, dtype=np.int64)
        later = positions >= ends[-1]
        found[later] = indices_at(positions[later], max(1, int(ends[-1])), seed)
        windows = np.searchsorted(ends, positions, side="right")
        for window in np.unique(windows[~later]):
            here = windows == window
            start = int(ends[window - 1]) if window else 0
            size = int(ends[window]) - start
            found[here] = start + permute(positions[here] - start, size, f"{seed}:0:{window}")
        return found

    def span(self, end: int) -> int:
        """Return the number of rows of the windows that hold the positions below `end`.

        The shards of these positions must be there.
        """
        ends = self._ends()
        return int(ends[min(int(np.searchsorted(ends, end)), len(ends) - 1)])

    def _ends(self) -> NDArray[np.int64]:
        """Return the number of rows before the end of every window that is there, at least 0."""
        whole = [end for end in self._windows if end <= self.stream.shards]
        rows = [max(0, self.stream.tokens_of(end) - 1) // self.length for end in whole]
        return np.array(rows or [0], dtype=np.int64)
