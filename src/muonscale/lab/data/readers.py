"""The reader of each kind of file, and which files of a corpus are read.

A file that holds no text for the corpus is refused if the user named it, and left out and counted
if it was found in a folder or an archive, or by a pattern.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from muonscale.errors import DataError
from muonscale.lab.data.files import Document, Stream, TextField, read_text
from muonscale.lab.data.folders import EXCLUDED, Patterns, SkippedFiles
from muonscale.lab.data.formats import HEAD_BYTES, ForeignError, check_content, check_name
from muonscale.lab.data.records import SEPARATORS, read_json, read_separated
from muonscale.lab.data.tables import read_arrow, read_parquet, seekable


class Selection:
    """Reads the files of a corpus that hold text for it, and counts the others.

    Args:
        left_out: where those that are not read are counted.
        patterns: which names are read.
    """

    def __init__(self, left_out: SkippedFiles, patterns: Patterns) -> None:
        self.left_out, self._patterns = left_out, patterns
        self.refused: ForeignError | None = None
        """Why the first file that was left out is no text."""
        self._read: set[str] = set()
        """Suffixes of files that were read."""
        self._lacking: dict[str, ForeignError] = {}
        """By suffix, why the records of a file are not those of the corpus."""

    def read(self, stream: Stream, *, named: bool) -> Iterator[Document]:
        """Yield the documents of a file; none if it is left out.

        Raises:
            DataError: if it cannot be read, is `named` and holds no text, or has other records
                than the files of its suffix.
            OSError: if it cannot be read.
        """
        documents = read_stream(stream)
        try:
            first = next(documents, None)
        except ForeignError as error:
            if named or (error.of_records and stream.suffix in self._read):
                raise
            if error.of_records:
                self._lacking.setdefault(stream.suffix, error)
            self.refused = self.refused or error
            self.left_out.add(error.reason, stream.name)
            return
        if first is None:
            return
        if stream.suffix in self._lacking:
            raise self._lacking[stream.suffix]
        self._read.add(stream.suffix)
        yield first
        yield from documents

    def read_member(self, archive: Stream, name: str, file: BinaryIO) -> Iterator[Document]:
        """Yield the documents of a member of an archive, as `read` does."""
        name = name.removeprefix("./")
        if any(part.startswith(".") for part in name.split("/")):
            return
        if self._patterns.excludes(name):
            self.left_out.add(EXCLUDED, f"{archive.name}/{name}")
            return
        member = replace(
            archive,
            name=f"{archive.name}/{name}",
            place=f"{archive.place}: {name}",
            title=name,
            file=file,
        )
        yield from self.read(member, named=False)


def read_stream(stream: Stream) -> Iterator[Document]:
    """Yield the documents of a file, by its suffix.

    Raises:
        ForeignError: before the first document, if it holds no text for this corpus.
        DataError: if its content does not match its suffix.
        OSError: if it cannot be read.
    """
    check_name(stream.place, stream.title)
    read = READERS.get(stream.suffix, read_text)
    if read not in (read_text, read_json, read_separated):
        yield from read(stream)
        return
    peeked = io.BufferedReader(stream.file, 1 << 16)  # pyrefly: ignore
    try:
        check_content(stream.place, peeked.peek(HEAD_BYTES)[:HEAD_BYTES])
        if read is read_text and not isinstance(stream.convert, TextField):
            raise ForeignError(
                f"{stream.place} is a text file, which holds no records; data.format=chat accepts "
                f"{', '.join(RECORDS)}",
                "text, which holds no records",
            )
        yield from read(replace(stream, file=peeked))
    finally:
        if not stream.file.closed:
            peeked.detach()  # the caller closes the file


def _read_compressed(stream: Stream) -> Iterator[Document]:
    path, kind = PurePosixPath(stream.title), stream.suffix.lstrip(".")
    plain = f"{path.stem}.tar" if kind in TAR_NAMES else path.stem
    file = DECOMPRESSORS[TAR_NAMES.get(kind, kind)](stream.file)
    try:
        yield from read_stream(replace(stream, title=plain, file=file))
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{stream.place} is damaged: {error}") from error
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise DataError(f"{stream.place} is damaged: {error}") from error


def _open_zstd(file: BinaryIO) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")


DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    "gz": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zst": _open_zstd,
}
"""How each compression is opened, by suffix. `formats.KINDS` refuses the suffixes of others."""
TAR_NAMES = {"tgz": "gz", "tbz2": "bz2", "txz": "xz"}
"""Suffixes of compressed tar archives, and how they are compressed."""


def _read_tar(stream: Stream) -> Iterator[Document]:
    try:
        with tarfile.open(fileobj=stream.file, mode="r|") as archive:
            for member in archive:
                if member.isfile() and (file := archive.extractfile(member)) is not None:
                    yield from stream.selection.read_member(stream, member.name, file)  # pyrefly: ignore
    except tarfile.TarError as error:
        raise DataError(f"{stream.place} is damaged, or no tar archive: {error}") from error


def _read_zip(stream: Stream) -> Iterator[Document]:
    try:
        with seekable(stream.file) as file, zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    content: Any = archive.open(member)
                    yield from stream.selection.read_member(stream, member.filename, content)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # or encrypted
        raise DataError(f"{stream.place} cannot be read as a zip archive: {error}") from error


Reader = Callable[[Stream], Iterator[Document]]
RECORDS: dict[str, Reader] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), read_json),
    **dict.fromkeys(SEPARATORS, read_separated),
    ".parquet": read_parquet,
    **dict.fromkeys((".arrow", ".feather"), read_arrow),
}
"""The readers of files of records, by suffix."""
UNPACKED: dict[str, Reader] = {
    **dict.fromkeys((f".{kind}" for kind in (*DECOMPRESSORS, *TAR_NAMES)), _read_compressed),
    ".tar": _read_tar,
    ".zip": _read_zip,
}
"""Readers of archives and compressed files, by suffix."""
READERS = RECORDS | UNPACKED
"""The reader of each suffix; any other file is text."""
