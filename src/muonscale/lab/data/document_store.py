"""A corpus in one file, so that it is read once and is the same for every later step.

The documents follow one another in the file; `DocumentStore` has their offsets and hashes. Training
and validation text are byte ranges of the file. An exact copy of a document is dropped, since one
could be in the training split and the other in the validation split.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from muonscale.errors import DataError
from muonscale.lab.data.encode_chunk import Cut
from muonscale.lab.data.files import Document
from muonscale.lab.data.folders import SkippedFiles
from muonscale.lab.files import write_atomic

PIECE_BYTES = 1 << 18
DIGEST_BYTES = 16
# With fewer documents, the end of each goes to the validation split: whole ones are too coarse.
WHOLE_DOCUMENTS = 20
# A document is not chosen if the validation split would exceed its share by more than this factor.
OVERSHOOT = 1.5

Range = tuple[int, int]


def total_bytes(ranges: Iterable[Range]) -> int:
    """Return the bytes of text in ranges."""
    return sum(end - start for start, end in ranges)


class TextPiece(NamedTuple):
    """A part of a document, small enough to tokenize at once."""

    text: str
    size: int
    """Bytes of the text."""
    first: bool
    """Whether a range begins with it."""


class DocumentStore:
    """The documents of a corpus in one file.

    Memory: about 120 bytes for each document.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets = array("Q")
        """Byte at which each document begins, and the end of the last."""
        self.offsets.append(0)
        self.digests: list[bytes] = []
        """Hash of each document's text."""
        self.duplicates = 0
        """Documents dropped because an earlier one has the same text."""
        self.left_out = SkippedFiles()
        """Files of the corpus that were not read."""

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def size(self) -> int:
        """Bytes of all documents."""
        return self.offsets[-1]

    def fill(
        self,
        documents: Iterable[Document],
        progress: Callable[[int], None],
        seen: set[bytes] | None = None,
    ) -> None:
        """Copy documents, calling `progress` with the bytes read so far.

        Args:
            documents: the corpus.
            progress: the callback.
            seen: hashes of documents in other stores, which are dropped here. Those of this store
                are added.

        Raises:
            OSError: if the disk is full or read-only.
        """
        seen = set() if seen is None else seen
        done = 0
        hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
        with self.path.open("wb") as file:

            def finish() -> None:
                start, digest = self.offsets[-1], hasher.digest()
                if file.tell() == start:
                    return
                if digest in seen:
                    self.duplicates += 1
                    file.seek(start)
                    file.truncate()
                    return
                seen.add(digest)
                self.digests.append(digest)
                self.offsets.append(file.tell())

            for document in documents:
                if document.first:
                    finish()
                    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
                encoded = document.text.encode("utf-8")
                hasher.update(encoded)
                file.write(encoded)
                done += len(encoded)
                progress(done)
            finish()

    def save(self) -> None:
        """Write down where the documents are, for `load`, after the text is on the disk."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        own = {"duplicates": self.duplicates, "left_out": asdict(self.left_out)}
        content = json.dumps(own).encode() + b"\n" + self.offsets.tobytes() + b"".join(self.digests)
        write_atomic(self._index, content)

    def load(self) -> bool:
        """Read what `save` wrote; return whether there was anything."""
        if not self._index.exists():
            return False
        with self._index.open("rb") as file:
            own, rest = json.loads(file.readline()), file.read()
        count = (len(rest) - 8) // (8 + DIGEST_BYTES)
        self.offsets = array("Q", rest[: 8 * (count + 1)])
        digests = rest[8 * (count + 1) :]
        self.digests = [
            digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)
        ]
        self.duplicates, self.left_out = own["duplicates"], SkippedFiles(**own["left_out"])
        return True

    @property
    def _index(self) -> Path:
        return self.path.with_name(f"{self.path.name}.index")

    def split(
        self, validation: float, seed: int, *, whole: bool = False
    ) -> tuple[list[Range], list[Range]]:
        """Return the byte ranges of the training split and of the validation split.

        From 20 documents on, whole ones are chosen, in the order of a hash of (seed, text), until
        `validation` of the bytes is reached. With fewer documents, or with too large ones, the end
        of every document is chosen, from a newline on.

        Args:
            validation: share of the bytes in the validation split, between 0 and 1.
            seed: decides which documents are chosen; any integer.
            whole: never cut a document.

        Raises:
            DataError: if no set of whole documents has about that share.
        """
        ranges = list(pairwise(self.offsets))
        if whole or len(ranges) >= WHOLE_DOCUMENTS:
            chosen = self._choose(ranges, validation * self.size, seed)
            if chosen:
                kept = [item for number, item in enumerate(ranges) if number not in chosen]
                return kept, [ranges[number] for number in sorted(chosen)]
        if whole:
            raise DataError(
                f"{len(ranges)} conversations are too few for whole ones to be about "
                f"data.validation={validation} of the text; give more conversations, or a larger share"
            )
        with self.map() as text:
            cuts = [_tail_start(text, start, end, validation) for start, end in ranges]
        train = [(start, cut) for (start, _), cut in zip(ranges, cuts, strict=True) if cut > start]
        tails = [(cut, end) for (_, end), cut in zip(ranges, cuts, strict=True) if end > cut]
        return train, tails

    def _choose(self, ranges: list[Range], wanted: float, seed: int) -> set[int]:
        key = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
        ranks = [hashlib.blake2b(d, digest_size=8, key=key).digest() for d in self.digests]
        chosen: set[int] = set()
        taken = 0
        for number in sorted(range(len(ranges)), key=ranks.__getitem__):
            size = ranges[number][1] - ranges[number][0]
            if taken >= wanted:
                return chosen
            if taken + size <= wanted * OVERSHOOT:
                chosen.add(number)
                taken += size
        return chosen if taken >= wanted / 2 else set()

    def map(self) -> mmap.mmap:
        """Return the text as a read-only memory map; the caller closes it."""
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def cuts(self, ranges: Iterable[Range]) -> Iterator[Cut]:
        """Yield pieces of ranges, of at most 256 KiB."""
        with self.map() as text:
            yield from _cut(text, ranges)

    def texts(self, ranges: Iterable[Range]) -> Iterator[str]:
        """Yield the text of every range whole."""
        with self.map() as text:
            for start, end in ranges:
                yield text[start:end].decode("utf-8")

    def sample(self, ranges: Sequence[Range], size: int) -> Iterator[TextPiece]:
        """Yield about `size` bytes of pieces, spread evenly over the ranges."""
        total = total_bytes(ranges)
        seen = taken = 0
        with self.map() as text:
            for start, end, first in _cut(text, ranges):
                if taken * total <= seen * size:
                    taken += end - start
                    yield TextPiece(text[start:end].decode("utf-8"), end - start, first)
                seen += end - start


def _cut(text: mmap.mmap, ranges: Iterable[Range]) -> Iterator[Cut]:
    """Yield start, end and whether a range begins, of pieces that end at a newline if possible."""
    for start, end in ranges:
        at = start
        while at < end:
            stop, limit = end, at + PIECE_BYTES
            if end > limit:
                stop = text.rfind(b"\n", at, limit) + 1 or _character_start(text, limit)
            yield at, stop, at == start
            at = stop


def _tail_start(text: mmap.mmap, start: int, end: int, validation: float) -> int:
    """Return where the validation part of a document begins: at a line, a word or a character."""
    cut = end - round((end - start) * validation)
    for separator in (b"\n", b" "):
        for found in (text.find(separator, cut, end), text.rfind(separator, start, cut)):
            # A line that is far away would change the share too much.
            if found >= 0 and abs(found - cut) < (end - cut) / 2:
                return found + 1
    return _character_start(text, cut) if cut < end else end


def _character_start(text: mmap.mmap, at: int) -> int:
    while text[at] & 0xC0 == 0x80:
        at -= 1
    return at
