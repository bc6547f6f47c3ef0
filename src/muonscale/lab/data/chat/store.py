"""Conversations on disk as tokens, and the rows of a batch that they are packed into.

A split has three streams: `SPLIT` of tokens, `targets-SPLIT` of whether the assistant has said them,
and `index-SPLIT` of two numbers for each conversation, its tokens and the place of its first target.
They do not depend on the length of a row.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muonscale.lab.data.chat.pack import pack
from muonscale.lab.data.loss_mask import BEGIN, NO_TARGET
from muonscale.lab.data.tokens import TokenStore

FLAG, NUMBER = np.dtype("u1"), np.dtype("<u4")


class ChatStore:
    """The conversations of a split; `len(store)` counts their tokens.

    Args:
        folder: where its shards are.
        split: name of the split.
        dtype: of tokens on disk.
        end: id of the end of text, which fills rows.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], end: int) -> None:
        self.tokens = TokenStore(folder, split, dtype)
        self.targets = TokenStore(folder, f"targets-{split}", FLAG)
        self.end = end
        self._index = TokenStore(folder, f"index-{split}", NUMBER)
        self._rows: dict[int, PackedChats] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """Tokens, and the place of the first target, of every conversation: `[conversations, 2]`."""
        return self._index.read(0, len(self._index)).reshape(-1, 2)

    def rows(self, length: int) -> PackedChats:
        """Return the rows of `length` inputs that the conversations are packed into."""
        if length not in self._rows:
            self._rows[length] = PackedChats(self, length)
        return self._rows[length]

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return tokens `start` to `start + count`, marked."""
        flags = self.targets.read(start, count)
        return self.tokens.read(start, count) | np.where(flags != 0, 0, NO_TARGET)


class PackedChats:
    """Rows of `length` inputs and a last target, each of whole conversations; see `marks`.

    A conversation longer than a row is cut at its end, and left out if that leaves it no target. Rows
    are filled up with the end of text, which is no target.
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
        """Return marked rows, shape `[B, length + 1]`.

        Raises:
            IndexError: if an index is not in range(len(self)).
        """
        rows = np.full((len(indices), self.length + 1), self.store.end | NO_TARGET, dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            if not 0 <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            self._fill(row, self._rows[int(index)])
        return rows

    def _fill(self, row: NDArray[np.int64], items: list[int]) -> None:
        at = 0
        for item in self._kept[items].tolist():
            size = int(self._lengths[item])
            row[at : at + size] = self.store.read(int(self._starts[item]), size)
            row[at] |= BEGIN
            at += size
        row[at : at + 1] |= BEGIN

    def facts(self) -> dict[str, Any]:
        """Return what has become of the conversations, for env.json."""
        used = int(self._lengths[self._kept].sum())
        return {
            "rows": len(self),
            "conversations": len(self._kept),
            "cut": int(np.count_nonzero(self.store.index[self._kept, 0] > self.length + 1)),
            "left_out": len(self._lengths) - len(self._kept),
            "padding": 1 - used / max(1, len(self) * (self.length + 1)),
        }
