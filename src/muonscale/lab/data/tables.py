"""Tables of Arrow: parquet, Arrow files, and data sets that `datasets` saved to disk."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from muonscale.errors import DataError, nearest
from muonscale.lab.data.files import Convert, Document, ErrorsT, Stream, decode, missing_field

ROWS = 1024
"""Rows that are read at once."""


def read_parquet(stream: Stream) -> Iterator[Document]:
    """Yield the rows of a parquet file."""
    import pyarrow.parquet as pq

    with _arrow_errors(stream, "a parquet file"), seekable(stream.file) as file:
        table = pq.ParquetFile(file)
        columns = _check_columns(stream, table.schema_arrow)
        yield from _rows(stream, table.iter_batches(batch_size=ROWS, columns=columns))


def read_arrow(stream: Stream) -> Iterator[Document]:
    """Yield the rows of an Arrow file or stream."""
    import pyarrow as pa

    with _arrow_errors(stream, "an Arrow file"), seekable(stream.file) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        table = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        _check_columns(stream, table.schema)
        batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
        yield from _rows(stream, batches)


@contextmanager
def _arrow_errors(stream: Stream, kind: str) -> Generator[None]:
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise DataError(f"{stream.place} is not {kind} that can be read: {error}") from error


@contextmanager
def seekable(file: BinaryIO) -> Generator[BinaryIO]:
    """Yield a file, or a temporary copy of a stream that can only be read on."""
    if isinstance(getattr(file, "raw", None), io.FileIO):
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy)
        copy.seek(0)
        yield copy


def _check_columns(stream: Stream, schema: Any) -> list[str] | None:
    """Return the columns to read of a table with an Arrow schema."""
    import pyarrow as pa

    columns = stream.convert.columns
    for name in columns or ():
        if name not in schema.names:
            raise missing_field(name, list(schema.names), stream.place)
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        if not any(test(kind) for test in is_text):
            raise DataError(
                f"column {name!r} of {stream.place} is {kind}; data.field must name text"
            )
    return columns


def _rows(stream: Stream, batches: Iterable[Any]) -> Iterator[Document]:
    return read_rows(batches, stream.name, stream.place, stream.convert, stream.errors)


def read_rows(
    batches: Iterable[Any], name: str, place: str, convert: Convert, errors: ErrorsT
) -> Iterator[Document]:
    """Yield the documents of the record batches of a table; for the rest see `Stream`."""
    import pyarrow as pa

    row = 0
    for batch in batches:
        column = None
        if (
            convert.columns is not None
        ):  # as bytes, so that an error names the one that is not UTF-8
            (column,) = convert.columns
            values = batch.column(batch.schema.get_field_index(column))
            if isinstance(values, pa.DictionaryArray):
                values = values.dictionary_decode()
            records = [{column: value} for value in values.cast(pa.large_binary()).to_pylist()]
        else:
            records = batch.to_pylist()
        for record in records:
            where = f"{place}, row {row}"
            if column is not None and record[column] is not None:
                record[column] = decode(
                    record[column], errors, lambda at, w=where: f"{w}, byte {at}"
                )
            yield Document(f"{name}:{row}", convert(record, where))
            row += 1


def is_saved_dataset(path: Path) -> bool:
    """Return whether a folder is one of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    names = ("dataset_dict.json",), ("state.json", "dataset_info.json")
    return any(all((path / name).is_file() for name in each) for each in names)


def saved_batches(path: Path, split: str, columns: list[str] | None) -> Iterable[Any]:
    """Return the record batches of a data set that was saved to disk.

    Args:
        path: its folder.
        split: the split to read of a DatasetDict; a Dataset has none.
        columns: the columns to read; None for all.

    Raises:
        DataError: if it cannot be read, or lacks the split or a column.
    """
    import datasets

    try:
        saved: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # its errors have no common base
        raise DataError(f"the data set saved in {path} cannot be read: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(
                f"data.split={split}: {path} has none; {nearest(split, map(str, saved))}"
            )
        saved = saved[split]
    for name in columns or ():
        if name not in saved.column_names:
            raise missing_field(name, saved.column_names, str(path))
    chosen = saved if columns is None else saved.select_columns(columns)
    for table in chosen.with_format("arrow").iter(ROWS):
        yield from table.to_batches()
