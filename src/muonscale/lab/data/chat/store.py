"""Conversations on disk as tokens, and the rows of a batch that they are packed into.

A split has three streams: `SPLIT` of tokens, `targets-SPLIT` of one flag for each token (whether
the assistant wrote it), and `index-SPLIT` of two numbers for each conversation: its tokens, and the
position of its first target. None of them depends on the length of a row.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muonscale.lab.data.loss_mask import BEGIN, NO_TARGET
from muonscale.lab.data.tokens import TokenStore, token_dtype

FLAG, NUMBER = np.dtype("u1"), np.dtype("<u4")


class ChatStore:
    """The conversations of a split; `len(store)` counts their tokens.

    Args:
        folder: where its shards are.
        split: name of the split.
        id_limit: number above every id of a token.
        end: id of the end of text, with which rows are padded.
    """

    def __init__(self, folder: Path, split: str, id_limit: int, end: int) -> None:
        self.tokens = TokenStore(folder, split, token_dtype(id_limit), id_limit)
        self.targets = TokenStore(folder, f"targets-{split}", FLAG)
        self.end = end
        self._index = TokenStore(folder, f"index-{split}", NUMBER)
        self._rows: dict[int, PackedChats] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """Tokens and position of the first target of every conversation: `[conversations, 2]`."""
        return self._index.read(0, len(self._index)).reshape(-1, 2)

    def rows(self, length: int) -> PackedChats:
        """Return the rows of `length` inputs that the conversations are packed into."""
        if length not in self._rows:
            self._rows[length] = PackedChats(self, length)
        return self._rows[length]

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return tokens `start` to `start + count`, with the bits of `loss_mask`."""
        flags = self.targets.read(start, count)
        return self.tokens.read(start, count) | np.where(flags != 0, 0, NO_TARGET)


class PackedChats:
    """Rows of `length` inputs and a last target, each of whole conversations; see `loss_mask`.

    A conversation longer than a row is cut at its end, and left out if no target remains. Rows are
    padded with the end of text, which is not a target.
    """

    def __init__(self, store: ChatStore, length: int) -> None:
        if length < 1:
            raise ValueError(f"length={length} must be at least 1 token")
        self.store, self.length = store, length
        whole, first_target = store.index.T
        self._starts = np.cumsum(whole) - whole
        self._lengths = np.minimum(whole, length + 1)
        self._kept = np.flatnonzero(first_target < self._lengths)
        self._rows = pack(self._lengths[self._kept], length + 1)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return rows with the bits of `loss_mask`, shape `[B, length + 1]`.

        Raises:
            IndexError: if an index is not in range(len(self)).
        """
        rows = np.full((len(indices), self.length + 1), self.store.end | NO_TARGET, dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            if not 0 <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            at = 0
            for item in self._kept[self._rows[int(index)]].tolist():
                size = int(self._lengths[item])
                row[at : at + size] = self.store.read(int(self._starts[item]), size)
                row[at] |= BEGIN
                at += size
            row[at : at + 1] |= BEGIN
        return rows

    def facts(self) -> dict[str, Any]:
        """Return the counts of conversations and the share of padding, for env.json."""
        used = int(self._lengths[self._kept].sum())
        return {
            "rows": len(self),
            "conversations": len(self._kept),
            "cut": int(np.count_nonzero(self.store.index[self._kept, 0] > self.length + 1)),
            "left_out": len(self._lengths) - len(self._kept),
            "padding": 1 - used / max(1, len(self) * (self.length + 1)),
        }


def pack(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Pack items into rows by best-fit decreasing.

    The longest item comes first. Each goes into the fullest row that still has room for it, else
    into a new row. This needs at most 11/9 of the fewest possible rows, and 4 more (Johnson,
    Demers, Ullman, Garey and Graham, SIAM J. Computing 3(4), 1974, whose bound holds for first-fit
    decreasing too).

    Args:
        lengths: lengths of the items, from 1 to capacity, int64 `[items]`.
        capacity: length of a row.

    Returns:
        The items of every row by number, the longest first. It depends on the lengths alone.

    Raises:
        ValueError: for a length out of range.
    """
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()} for rows of {capacity}")
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set if some row has room for r; the best fit is the lowest bit >= length
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
