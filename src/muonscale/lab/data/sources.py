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

from muonscale.errors import DataError, nearest
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data.chat.conversations import conversation_text
from muonscale.lab.data.files import (
    Document,
    clean_text,
    list_files,
    missing_field,
    read_file,
    refuse_foreign,
)
from muonscale.lab.files import check_regular

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


def read_documents(data: DataSection) -> Iterator[Document]:
    """Yield the documents of a corpus, at most `data.max_bytes` bytes of text.

    Raises:
        DataError: if the corpus is missing, or something in it cannot be read as text.
    """
    documents = _all_documents(data)
    if data.max_bytes is None:
        return documents
    return _first_bytes(documents, data.max_bytes, whole=data.format == "chat")


def _all_documents(data: DataSection) -> Iterator[Document]:
    if data.path is not None:
        return _read_path(data.path.expanduser(), data)
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
        refuse_foreign(list_files(data.path.expanduser()), data.path)
        return {"path": str(data.path.expanduser().resolve()), "files": file_states(data.path)}
    if data.source in (STDLIB, REFERENCE):
        return {"source": data.source, "python": sys.version, "folder": str(_stdlib_folder())}
    folder = Path((data.source or "").removeprefix(HUB)).expanduser()
    files = file_states(folder, "data.source") if folder.is_dir() else []
    return {"source": data.source, "split": data.split, "files": files}


def file_states(path: Path, key: str = "data.path") -> list[list[Any]]:
    """Return name, size in bytes and modification time in nanoseconds of every file.

    Args:
        path: a file or a folder.
        key: key of the configuration that names it, for errors.

    Raises:
        DataError: if it cannot be read, or contains anything but folders and regular files.
    """
    states = []
    for name, file in list_files(path.expanduser(), key):
        try:
            check_regular(file)
            status = file.stat()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror} ({key})") from error
        states.append([name, status.st_size, status.st_mtime_ns])
    return states


def known_bytes(data: DataSection) -> int | None:
    """Return the bytes to read, for a progress bar; None if unknown."""
    if data.path is not None:
        size = sum(state[1] for state in file_states(data.path))
    elif data.source == STDLIB:
        size = sum(path.stat().st_size for _, path in _stdlib_files())
    elif data.source == REFERENCE:
        size = sum(len(text.encode()) for text in _topics().values())
    else:
        return data.max_bytes
    return size if data.max_bytes is None else min(size, data.max_bytes)


def _read_path(path: Path, data: DataSection) -> Iterator[Document]:
    files = list_files(path)
    if len(files) == 1 and files[0][1].is_file() and not files[0][1].stat().st_size:
        raise DataError(f"data.path={files[0][1]} is empty")
    refuse_foreign(files, path)
    convert = conversation_text if data.format == "chat" else clean_text
    for name, file in files:
        yield from read_file(name, file, field=data.text_field, errors=data.errors, convert=convert)


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
    rows = _hub_rows(name, data)
    field, convert = data.text_field, conversation_text if data.format == "chat" else clean_text
    for number in itertools.count():
        try:
            row = next(rows, None)
        except Exception as error:  # the network, a server and a loader raise anything
            raise _hub_error(name, data.split, error) from error
        if row is None:
            return
        place = f"Hugging Face dataset {name!r}, split {data.split!r}, row {number}"
        if field not in row:
            raise missing_field(field, list(row), place)
        text = convert(row[field], field=field, errors=data.errors, place=place)
        yield Document(f"{number}", text)


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
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return DataError(
        f"Hugging Face dataset {name!r}, split {split!r}, cannot be read: {reason}; "
        "check the name, data.split and the network"
    )
