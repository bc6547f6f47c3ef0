"""Files of records: JSON Lines, JSON arrays and separated tables."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from muonscale.errors import DataError
from muonscale.lab.data.files import (
    BOM,
    PIECE_BYTES,
    Document,
    Stream,
    decode,
    missing_field,
    texts,
)
from muonscale.lab.data.formats import ForeignError

SEPARATORS = {".csv": ",", ".tsv": "\t", ".psv": "|"}


def read_json(stream: Stream) -> Iterator[Document]:
    """Read one object per line, or an array of objects."""
    file = stream.file
    assert isinstance(file, io.BufferedReader)
    is_array = file.peek(1)[:PIECE_BYTES].removeprefix(BOM).lstrip().startswith(b"[")
    found = _json_array(stream) if is_array else _json_lines(stream)
    for number, (place, record) in enumerate(found):
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise _bad_record(f"a JSON {kind} in {place}; a record must be one JSON object", number)
        name = f"{stream.name}:{place.rsplit(' ', 1)[1]}"
        yield Document(name, stream.convert(record, place))


def _bad_record(message: str, number: int) -> DataError:
    """Return the error for a record: a file whose first one is bad holds something else."""
    return (
        DataError(message)
        if number
        else ForeignError(message, "JSON without records", of_records=True)
    )


def _json_lines(stream: Stream) -> Iterator[tuple[str, Any]]:
    offset = found = 0
    for number, line in enumerate(stream.file, start=1):
        where = f"{stream.place}, line {number}"
        content = line.removeprefix(BOM) if number == 1 else line
        start = offset + len(line) - len(content)
        text = decode(content, stream.errors, lambda at, s=start, w=where: f"{w}, byte {s + at}")
        offset += len(line)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _bad_record(f"not JSON in {where}: {error}", found) from error
        yield where, record
        found += 1


def _json_array(stream: Stream) -> Iterator[tuple[str, Any]]:
    """Yield the items of an array without holding all of it."""
    decoder, pieces = json.JSONDecoder(), texts(stream)
    text, at, number = next(pieces), 0, 0
    between = re.compile(r"[\s,]*")  # a missing comma is forgiven
    at = text.index("[") + 1
    while True:
        at = between.match(text, at).end()  # pyrefly: ignore
        where = f"{stream.place}, record {number + 1}"
        if text.startswith("]", at):
            if (text[at + 1 :] + "".join(pieces)).strip():
                raise DataError(f"text after the JSON array of {stream.place}")
            return
        try:
            record, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            more = _take(pieces, len(text) - at)  # twice the text, so that the work is linear
            if not more:
                raise _bad_record(f"not JSON in {where}: {error}", number) from error
            text, at = text[at:] + more, 0
            continue
        if not isinstance(record, dict | list | str):
            raise _bad_record(
                f"a JSON {type(record).__name__} in {where}; a record must be one JSON object",
                number,
            )
        yield where, record
        at, number = end, number + 1


def _take(pieces: Iterator[str], size: int) -> str:
    """Return the next pieces, until they have `size` characters or end."""
    taken: list[str] = []
    while sum(map(len, taken)) < max(1, size) and (piece := next(pieces, None)) is not None:
        taken.append(piece)
    return "".join(taken)


def read_separated(stream: Stream) -> Iterator[Document]:
    """Read a table whose first row names the columns."""
    limit = csv.field_size_limit(sys.maxsize)  # the default is 128 kB, for all of the process
    rows = csv.reader(_lines(stream), delimiter=SEPARATORS[stream.suffix], strict=True)
    header: list[str] | None = None
    try:
        for row in rows:
            where = f"{stream.place}, line {rows.line_num}"
            if not row:
                continue
            if header is None:
                header = row
                if missing := [name for name in stream.convert.columns or () if name not in row]:
                    raise missing_field(missing[0], row, stream.place)
                continue
            if len(row) != len(header):
                raise DataError(f"{len(row)} cells instead of {len(header)} in {where}")
            record = dict(zip(header, row, strict=True))
            yield Document(f"{stream.name}:{rows.line_num}", stream.convert(record, where))
    except csv.Error as error:
        raise DataError(f"{stream.place}, line {rows.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _lines(stream: Stream) -> Iterator[str]:
    rest = ""
    for text in texts(stream):
        lines = io.StringIO(rest + text, newline="\n")
        rest = ""
        for line in lines:
            if line.endswith("\n"):
                yield line
            else:
                rest = line
    if rest:
        yield rest
