"""Tokens on disk: written once as shards, read by position through memory maps.

A split is one long stream of tokens in files `SPLIT-00000.bin`, `SPLIT-00001.bin`, ... of raw
little-endian integers. `Sequences` cuts the stream into rows for training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from muonscale.errors import DataError

SHARD_BYTES = 200_000_000


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest type on disk for a vocabulary: uint16 up to 65536 tokens, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class TokenWriter:
    """A context manager that appends tokens to the shards of a split.

    Args:
        folder: folder of the shards.
        split: name of the split, with which their names begin.
        dtype: type on disk, from `token_dtype`.
        shard_bytes: size of a shard in bytes.
    """

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype[Any], shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.shard_tokens = max(1, shard_bytes // dtype.itemsize)
        self.count = 0
        """Tokens written so far."""
        self._file: BinaryIO | None = None

    def write(self, tokens: NDArray[Any]) -> None:
        """Append tokens. Raises OSError where the disk is full or read-only."""
        tokens = tokens.astype(self.dtype, copy=False)
        while tokens.size:
            at = self.count % self.shard_tokens
            if at == 0:
                self.close()
                number = self.count // self.shard_tokens
                self._file = shard_path(self.folder, self.split, number).open("wb")
            assert self._file is not None
            part = tokens[: self.shard_tokens - at]
            self._file.write(part.tobytes())
            self.count += part.size
            tokens = tokens[part.size :]

    def close(self) -> None:
        """Write what is buffered. Raises OSError where the disk is full."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Return the path of one shard."""
    return folder / f"{split}-{number:05d}.bin"


class TokenStore:
    """The tokens of one split, read by position; `len(store)` counts them.

    Pickles as its folder, so that it can be handed to other processes.

    Args:
        folder: folder of the shards.
        split: name of the split.
        dtype: type on disk.
        limit: number above every value, such as the size of the vocabulary; None for no check.
    """

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype[Any], limit: int | None = None
    ) -> None:
        self.folder, self.split, self.dtype, self.limit = folder, split, dtype, limit
        self._shards = [map_shard(path, dtype) for path in self._paths()]
        # Token position at which each shard begins, and the end.
        self._starts = np.cumsum([0, *(shard.size for shard in self._shards)])

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.split}-*.bin"))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shards(self) -> int:
        """Number of shards that are open."""
        return len(self._shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder, self.split, self.dtype, self.limit)

    def rows(self, length: int) -> Sequences:
        """Return the stream cut into sequences of `length` inputs."""
        return Sequences(self, length)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return tokens `start` to `start + count`, across shard borders.

        Raises:
            IndexError: if the range is not inside the store.
            DataError: for a token that the vocabulary does not have.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        out = np.empty(count, dtype=np.int64)
        done = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < count:
            at = start + done - int(self._starts[shard])
            part = self._shards[shard][at : at + count - done]
            if self.limit is not None and part.size and part.max() >= self.limit:
                raise DataError(
                    f"token file {shard_path(self.folder, self.split, shard)} is damaged: it has "
                    f"the token {part.max()} of a vocabulary of {self.limit}; remove its folder to "
                    "prepare it again"
                )
            out[done : done + part.size] = part
            done += part.size
            shard += 1
        return out


def map_shard(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the tokens of a shard as a memory map. Raises DataError if it cannot be read."""
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(
            f"token file {path} cannot be read: {error}; remove its folder to prepare it again"
        ) from error


class Rows(Protocol):
    """Rows of `length` inputs and a last target, by number; batches are made of them."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def batch(self, indices: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return rows, shape [B, length + 1]: token ids, with the flags of `loss_mask` if any."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return how the rows were made, for env.json."""
        ...


class Sequences:
    """A token stream cut into sequences of `length` inputs, each with its next token as target.

    Sequence i begins at token i * length. The last target of a sequence is the first input of the
    next one. Tokens left over at the end are unused. `len(sequences)` counts the sequences.
    """

    def __init__(self, store: TokenStore, length: int) -> None:
        if length < 1:
            raise ValueError(f"length={length} must be at least 1 token")
        self.store, self.length = store, length

    def __len__(self) -> int:
        return max(0, len(self.store) - 1) // self.length

    def batch(self, indices: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return rows of tokens, shape [B, length + 1]: inputs `[:, :-1]`, targets `[:, 1:]`.

        Raises:
            IndexError: if an index is not in range(len(self)).
        """
        rows = np.empty((len(indices), self.length + 1), dtype=np.int64)
        for row, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"sequence {index} of {len(self)}")
            rows[row] = self.store.read(int(index) * self.length, self.length + 1)
        return rows

    def facts(self) -> dict[str, Any]:
        """Return an empty dict."""
        return {}
