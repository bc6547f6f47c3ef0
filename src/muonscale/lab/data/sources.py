"""Where documents come from: the Python library, a Hugging Face dataset, or the user's files.

`read_documents` iterates over a whole corpus in a fixed order. `identify` describes a corpus
without reading it, so that a corpus prepared earlier is found at once.
"""

from __future__ import annotations

import itertools
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muonscale.errors import DataError, first_line, nearest
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data.chat.conversations import Conversation
from muonscale.lab.data.files import Convert, Document, Stream, TextField
from muonscale.lab.data.folders import (
    CorpusFile,
    Patterns,
    SkippedFiles,
    file_states,
    find_files,
    pattern_lists,
    read_states,
    unreadable,
)
from muonscale.lab.data.formats import ForeignError, check_name
from muonscale.lab.data.readers import UNPACKED, Selection
from muonscale.lab.data.tables import is_saved_dataset, read_rows, saved_batches

STDLIB = "python-stdlib"
REFERENCE = "python-reference"
HUB = "hf:"
# Folders of third-party code, of tests, and of tables that a program wrote.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "lib-dynload",
    "ensurepip",
}
SKIPPED_FILES = {"html/entities.py", "stringprep.py"}


def read_documents(data: DataSection, left_out: SkippedFiles | None = None) -> Iterator[Document]:
    """Yield the documents of a corpus, at most `data.max_bytes` bytes of text.

    Args:
        data: the data section of one corpus.
        left_out: where files that are not read are counted.

    Raises:
        DataError: if the corpus is missing, or something in it cannot be read as text.
    """
    documents = _all_documents(data, SkippedFiles() if left_out is None else left_out)
    if data.max_bytes is not None:
        documents = _first_bytes(documents, data.max_bytes, whole=data.format == "chat")
    try:
        yield from documents
    except ForeignError as error:  # nothing is left to leave it out of
        raise DataError(str(error)) from error


def _all_documents(data: DataSection, left_out: SkippedFiles) -> Iterator[Document]:
    if data.path is not None:
        return _read_path(data, left_out)
    source = data.source or ""
    if source == STDLIB:
        return _read_stdlib()
    if source == REFERENCE:
        return (Document(name, text) for name, text in sorted(_topics().items()))
    if source.startswith(HUB):
        return _read_hub(source.removeprefix(HUB), data)
    raise DataError(
        f"unknown data.source {source!r}; {nearest(source, [STDLIB, REFERENCE, HUB + 'NAME'])} "
        "data.path names a file or a folder"
    )


def _first_bytes(documents: Iterator[Document], limit: int, *, whole: bool) -> Iterator[Document]:
    for document in documents:
        encoded = document.text.encode("utf-8")
        if whole and len(encoded) > limit:
            return
        if len(encoded) >= limit:
            text = encoded[:limit].decode("utf-8", "ignore")  # drops a character cut in two
            yield Document(document.name, text, document.first)
            return
        limit -= len(encoded)
        yield document


def identify(data: DataSection) -> dict[str, Any]:
    """Return what distinguishes this corpus from others, as JSON values, without reading its text.

    Files are identified by path, size and modification time, the Python library by its version, and
    a hub dataset by its name alone, so that a prepared one needs no network.

    Raises:
        DataError: if the path is missing or unreadable, or a file is not text by its name.
    """
    if data.path is not None:
        files, _ = find_files(data)
        if data.format != "tokens":
            _check_names(files)
        paths = [
            path if "://" in path else str(Path(path).expanduser().resolve()) for path in data.paths
        ]
        return {
            "path": paths,
            "files": read_states(files, "data.path"),
            **pattern_lists(data),
        }
    if data.source in (STDLIB, REFERENCE):
        return {"source": data.source, "python": sys.version, "folder": str(_stdlib_folder())}
    folder = Path((data.source or "").removeprefix(HUB)).expanduser()
    files = file_states(folder, "data.source") if folder.is_dir() else []
    return {"source": data.source, "split": data.split, "files": files}


def _check_names(files: list[CorpusFile]) -> None:
    """Refuse a file that the user named and that is no text by its name, or files none of which is."""
    refused = []
    for file in files:
        try:
            check_name(file.place, file.name)
        except ForeignError as error:
            if file.named:
                raise DataError(str(error)) from error
            refused.append(error)
    if len(refused) == len(files):
        raise DataError(f"{refused[0]}; none of {len(files)} files of data.path is text")


def known_bytes(data: DataSection) -> int | None:
    """Return the bytes to read, for a progress bar; None if unknown."""
    if data.path is not None:
        states = read_states(find_files(data)[0], "data.path")
        if any(Path(name).suffix.lower() in UNPACKED for name, *_ in states):
            return data.max_bytes
        size = sum(state[1] for state in states)
    elif data.source == STDLIB:
        size = sum(path.stat().st_size for _, path in _stdlib_files())
    elif data.source == REFERENCE:
        size = sum(len(text.encode()) for text in _topics().values())
    else:
        return data.max_bytes
    return size if data.max_bytes is None else min(size, data.max_bytes)


def converter(data: DataSection) -> Convert:
    """Return what turns a record of the corpus into text."""
    if data.format == "chat":
        return Conversation(data.field, data.errors)
    return TextField(data.text_field, data.errors)


def _read_path(data: DataSection, left_out: SkippedFiles) -> Iterator[Document]:
    convert, selection = converter(data), Selection(left_out, Patterns.of(data))
    folders = [path for given in data.paths if is_saved_dataset(path := Path(given).expanduser())]
    if folders and len(folders) == len(data.paths):
        for folder in folders:
            yield from _read_saved(folder, data)
        return
    files, found = find_files(data)
    for reason, count in found.counts.items():
        left_out.counts[reason] = left_out.counts.get(reason, 0) + count
        left_out.examples.setdefault(reason, found.examples[reason])
    if len(files) == 1 and not read_states(files, "data.path")[0][1]:
        raise DataError(f"data.path={files[0].place} is empty")
    _check_names(files)
    any_read = False
    for file in files:
        try:
            with file.open() as content:
                stream = Stream(
                    file.name, file.place, file.name, content, convert, data.errors, selection
                )
                for document in selection.read(stream, named=file.named):
                    any_read = True
                    yield document
        except OSError as error:
            raise unreadable(file.place, error) from error
    if not any_read and selection.refused is not None:
        raise DataError(f"{selection.refused}; nothing else of data.path={data.title} is text")


def _read_saved(folder: Path, data: DataSection) -> Iterator[Document]:
    convert = converter(data)
    place = f"{folder}, split {data.split!r}"
    batches = saved_batches(folder, data.split, convert.columns)
    yield from read_rows(batches, folder.name, place, convert, data.errors)


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> list[tuple[str, Path]]:
    folder = _stdlib_folder()
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths = (Path(root, name) for name in names if name.endswith(".py"))
        found.extend((path.relative_to(folder).as_posix(), path) for path in paths)
    # _sysconfigdata holds the settings of this build, which differ between machines.
    found = [
        (name, path)
        for name, path in found
        if name not in SKIPPED_FILES and not name.startswith("_sysconfigdata")
    ]
    if not found:
        raise DataError(
            f"no Python source in {folder}: this Python was installed without it; use another "
            "Python, or your own text with data.path"
        )
    return sorted(found)


def _read_stdlib() -> Iterator[Document]:
    for name, path in _stdlib_files():
        try:
            with tokenize.open(path) as file:  # knows PEP 263 coding lines
                yield Document(name, file.read())
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} cannot be read as Python source: {error}; use your own text with data.path"
            ) from error


def _topics() -> dict[str, str]:
    """Return the sections of the language reference that `help()` shows, by name."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"data.source={REFERENCE}: this Python was installed without pydoc_data ({error}); use "
            "another Python, or your own text with data.path"
        ) from error
    return topics


def _read_hub(name: str, data: DataSection) -> Iterator[Document]:
    folder = Path(name).expanduser()
    if is_saved_dataset(folder):
        yield from _read_saved(folder, data)
        return
    rows, convert = _hub_rows(name, data), converter(data)
    for number in itertools.count():
        try:
            row = next(rows, None)
        except Exception as error:  # the network, a server and a loader raise anything
            raise _hub_error(name, data.split, error) from error
        if row is None:
            return
        place = f"Hugging Face dataset {name!r}, split {data.split!r}, row {number}"
        yield Document(f"{number}", convert(row, place))


def _hub_rows(name: str, data: DataSection) -> Iterator[dict[str, Any]]:
    import datasets

    path, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(
            str(Path(path).expanduser()) if path.startswith("~") else path,
            config or None,
            split=data.split,
            streaming=True,
        )
        return iter(dataset)
    except Exception as error:  # the hub client's errors have no common base
        raise _hub_error(name, data.split, error) from error


def _hub_error(name: str, split: str, error: Exception) -> DataError:
    return DataError(
        f"Hugging Face dataset {name!r}, split {split!r}, cannot be read: {first_line(error)}; "
        "check the name, data.split and the network"
    )
