"""Text, JSONL and parquet files as documents.

All bytes are decoded here. Errors name the file and the place of whatever is not UTF-8, not JSON or
not a string. A large text file is read in pieces of about a megabyte. docs/decisions.md ("Files are
read by our own code") says why this is not done by the datasets library.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from muonscale.errors import DataError
from muonscale.lab.data.formats import (
    HEAD_BYTES,
    describe_content,
    describe_name,
    is_other_encoding,
)

PIECE_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
ErrorsT = Literal["strict", "replace"]


class Convert(Protocol):
    """Converts the value of a record to text, as `clean_text` does."""

    def __call__(self, value: Any, *, field: str, errors: ErrorsT, place: str) -> str:
        """Return the text. Raises DataError, which names the place."""
        ...


@dataclass(frozen=True)
class Document:
    """A document, or the next piece of the document before it."""

    name: str
    """Path below the corpus folder, with the line or row for JSONL and parquet."""
    text: str
    """The text, without lone surrogates: it always encodes as UTF-8."""
    first: bool = True
    """False for the second and later pieces of one document."""


def clean_text(value: Any, *, field: str, errors: ErrorsT, place: str) -> str:
    """Return a record's text, free of lone surrogates.

    Raises:
        DataError: if the value is not a string, or holds lone surrogates and errors is `strict`.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{field!r} is {kind} in {place}; data.field must name a field with text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        if errors == "replace":
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise DataError(
            f"{field!r} holds the lone surrogate {value[error.start]!r} in {place}; repair it, or "
            "accept replacement characters with data.errors=replace"
        ) from None
    return value


def missing_field(field: str, found: list[str], place: str) -> DataError:
    """Return the error for a record or table without the column `data.field` names."""
    return DataError(
        f"no {field!r} in {place}, only {', '.join(map(repr, found)) or 'nothing'}; name the field "
        "that holds the text with data.field"
    )


def list_files(path: Path, key: str = "data.path") -> list[tuple[str, Path]]:
    """Return the files of a corpus with their names: the file itself, or a folder's, sorted.

    Hidden files and folders are skipped; everything else in a folder is part of the corpus.

    Args:
        path: the file or folder.
        key: key of the configuration that names it, for errors.

    Raises:
        DataError: if the path is missing, cannot be read or holds no file.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _unreadable(path, error, key) from error
    if stat.S_ISREG(mode):
        return [(path.name, path)]
    if not stat.S_ISDIR(mode):
        raise DataError(f"{key}={path} is neither a file nor a folder")
    files = sorted((file.relative_to(path).as_posix(), file) for file in _walk(path, key))
    if not files:
        raise DataError(f"{key}={path} holds no files (hidden files are skipped)")
    return files


def _walk(path: Path, key: str) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error, key) from error

    for root, folders, names in os.walk(path, onerror=fail, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root) / name for name in names if not name.startswith("."))


def _unreadable(path: Path, error: OSError, key: str = "data.path") -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error} ({key})")


def refuse_foreign(files: list[tuple[str, Path]], path: Path) -> None:
    """Raise DataError if the name of a file of a corpus says that it is not text.

    Args:
        files: the files, as `list_files` returns them.
        path: `data.path`.
    """
    found = [foreign for _, file in files if (foreign := describe_name(file)) is not None]
    if found:
        more = f" ({len(found)} of {len(files)} files of data.path={path} are not text)"
        raise DataError(f"{found[0]}{more if len(files) > 1 else ''}")


def read_file(
    name: str, path: Path, *, field: str, errors: ErrorsT, convert: Convert = clean_text
) -> Iterator[Document]:
    """Yield the documents of one file, by its suffix: .jsonl and .json, .parquet, else text.

    Args:
        name: name of the file in the corpus, with which the names of its documents begin.
        path: the file.
        field: key or column that holds the text in JSONL and parquet.
        errors: `strict` refuses bytes that are not UTF-8, `replace` substitutes U+FFFD.
        convert: converts the value of the field to text.

    Raises:
        DataError: if the file cannot be read, or its content does not match its suffix.
    """
    suffix = path.suffix.lower()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(
                f"{path} is not a regular file but a device, pipe or socket (data.path)"
            )
        if suffix == ".parquet":
            yield from _read_parquet(name, path, field, errors, convert)
            return
        with path.open("rb") as file:
            if (foreign := describe_content(path, file.read(HEAD_BYTES))) is not None:
                raise DataError(foreign)
            file.seek(0)
            if suffix in (".jsonl", ".json"):
                yield from _read_json_lines(name, path, file, field, errors, convert)
            elif convert is clean_text:
                yield from _read_text(name, path, file, errors)
            else:
                raise DataError(
                    f"{path} is a text file, which holds no records; data.format=chat accepts "
                    ".jsonl, .json, .parquet"
                )
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_text(name: str, path: Path, file: BinaryIO, errors: ErrorsT) -> Iterator[Document]:
    head = file.read(len(BOM))
    offset, line = (len(BOM), 1) if head == BOM else (0, 1)
    file.seek(offset)
    first = True
    for piece in _pieces(file):
        place = partial(_place, path, offset, line, piece)
        if (at := piece.find(b"\0")) >= 0:
            raise DataError(
                f"a NUL byte in {place(at)}: the file is not UTF-8 text, but binary data or text "
                "in another encoding; convert it, or remove the NUL bytes if it is text"
            )
        text = _decode(piece, errors, place)
        offset += len(piece)
        line += piece.count(b"\n")
        yield Document(name, text, first)
        first = False


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """Yield blocks that end at a newline, or between two characters where no newline comes."""
    rest = b""
    while block := file.read(PIECE_BYTES):
        block = rest + block
        cut = block.rfind(b"\n") + 1 or _character_end(block)
        rest = block[cut:]
        if cut:
            yield block[:cut]
    if rest:
        yield rest


def _character_end(block: bytes) -> int:
    """Return where the last complete UTF-8 character of a block ends."""
    for back in range(1, min(4, len(block)) + 1):
        lead = block[-back]
        if lead >= 0xC0:
            length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return len(block) - back if length > back else len(block)
        if lead < 0x80:
            break
    return len(block)


def _place(path: Path, offset: int, line: int, piece: bytes, at: int) -> str:
    line += piece.count(b"\n", 0, at)
    return f"{path}, byte {offset + at}, line {line}"


def _decode(data: bytes, errors: ErrorsT, place: Callable[[int], str]) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"not UTF-8: bytes {data[error.start : error.end].hex(' ')} in {place(error.start)}"
        if is_other_encoding(data):
            raise DataError(
                f"{found}, and more than a tenth of what follows: it is in another encoding, or no "
                "text; convert it to UTF-8"
            ) from None
        if errors == "replace":
            return data.decode("utf-8", "replace")
        raise DataError(
            f"{found}; convert the file, or accept replacement characters with data.errors=replace"
        ) from None


def _read_json_lines(
    name: str, path: Path, file: BinaryIO, field: str, errors: ErrorsT, convert: Convert
) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(file, start=1):
        where = f"{path}, line {number}"
        content = line.removeprefix(BOM) if number == 1 else line
        start = offset + len(line) - len(content)
        text = _decode(content, errors, lambda at, s=start, w=where: f"{w}, byte {s + at}")
        offset += len(line)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            begins_array = number == 1 and text.lstrip().startswith("[")
            hint = "; it begins a JSON array: write each record as a line" if begins_array else ""
            raise DataError(f"not JSON in {where}: {error}{hint}") from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError(f"a JSON {kind} in {where}; each line must be one JSON object")
        if field not in record:
            raise missing_field(field, list(record), where)
        value = convert(record[field], field=field, errors=errors, place=where)
        yield Document(f"{name}:{number}", value)


def _read_parquet(
    name: str, path: Path, field: str, errors: ErrorsT, convert: Convert
) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    as_text = convert is clean_text
    row = 0
    try:
        with pq.ParquetFile(path) as table:
            schema = table.schema_arrow
            if field not in schema.names:
                raise missing_field(field, list(schema.names), str(path))
            kind = schema.field(field).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
            if as_text and not any(is_kind(kind) for is_kind in strings):
                raise DataError(f"column {field!r} of {path} is {kind}; data.field must name text")
            for batch in table.iter_batches(columns=[field], batch_size=1024):
                column = batch.column(0)
                if as_text:  # as bytes, so that an error names the one that is not UTF-8
                    if isinstance(column, pa.DictionaryArray):
                        column = column.dictionary_decode()
                    column = column.cast(pa.large_binary())
                for value in column.to_pylist():
                    where = f"{path}, row {row}"
                    if as_text and value is not None:
                        value = _decode(value, errors, lambda at, w=where: f"{w}, byte {at}")
                    text = convert(value, field=field, errors=errors, place=where)
                    yield Document(f"{name}:{row}", text)
                    row += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a parquet file that can be read: {error}") from error
