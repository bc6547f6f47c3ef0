"""The cache of prepared corpora: finds a corpus, checks it, and puts a new one into place.

    CACHE/requests/KEY.json     settings and file states -> fingerprint
    CACHE/FINGERPRINT/          token shards, tokenizer/, and meta.json with every file's digests

A folder is written under another name and renamed when it is complete. Whenever a corpus is opened,
files of up to `HASHED_BYTES` are compared with their SHA-256, and larger ones with the SHA-256 of
blocks of theirs, or wholly if they were written to since.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from muonscale.errors import DataError, MuonscaleError
from muonscale.lab.files import (
    check_local,
    hold_lock,
    is_locked,
    open_regular,
    read_object,
    sha256,
    size_and_hash,
    sync_folder,
    write_json,
)

PARTIAL = ".partial-"
# A partial folder is left over from a killed process if nothing was written in it for this long.
STALE_SECONDS = 24 * 3600
PREFIX = 16
LOCK = "lock"
"""File in a partial folder that its writer locks."""

HASHED_BYTES = 2**26
"""Largest file that is hashed whole whenever a corpus is opened."""
BLOCKS, BLOCK_BYTES = 64, 2**16
"""Number and size of the blocks of a larger file that are hashed."""


class UnfinishedError(DataError):
    """A preparation that ended early; what it has done is kept for the next of the same key."""


def cache_folder(chosen: Path | None) -> Path:
    """Return data.cache, else $MUONSCALE_CACHE, else muonscale in the user's cache folder."""
    if chosen is not None:
        return chosen.expanduser()
    if value := os.environ.get("MUONSCALE_CACHE"):
        check_local(value, "MUONSCALE_CACHE")
        return Path(value).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "muonscale"


def cache_error(cache: Path, error: OSError) -> DataError:
    """Return the error for a cache folder that cannot be written or read."""
    file = f"{error.filename}: " if error.filename else ""
    return DataError(
        f"prepared tokens cannot be kept in {cache}: {file}{error.strerror or error}; choose "
        "another folder with data.cache=FOLDER"
    )


def entry_path(cache: Path, fingerprint: str) -> Path:
    """Return the folder of a prepared corpus, whether it exists or not."""
    return cache / fingerprint[:PREFIX]


@contextmanager
def partial_folder(cache: Path, key: str | None = None) -> Generator[Path]:
    """Yield a folder for this process to write into, and remove those of killed processes.

    It is removed at the end, also after an error. With a key, a process that was killed or stopped,
    or raises `UnfinishedError`, leaves it, and the next one of the same key goes on with it, unless
    another process does. A folder is left alone while its writer holds its lock, since clocks jump,
    and for a day, since a file system may have no locks.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        path = _claim(cache, key, stack) if key else None
        is_kept = path is not None
        if path is None:
            path = _new_name(cache)
            path.mkdir()  # not by tempfile: a cache may be shared, so the umask decides who reads it
            stack.enter_context(hold_lock(path / LOCK))
        for other in cache.glob(PARTIAL + "*"):
            stale = time.time() - _last_written(other) > STALE_SECONDS
            if stale and not is_locked(other / LOCK):
                _remove(other)
        try:
            yield path
        except Exception as error:
            is_kept = is_kept and isinstance(error, UnfinishedError)
            raise
        else:
            is_kept = False
        finally:
            if not is_kept:
                _remove(path)


def _remove(folder: Path) -> None:
    """Remove a folder under another name: else a process that claims it now would lose files."""
    grave = _new_name(folder.parent)
    with suppress(OSError):
        folder = folder.rename(grave)
    shutil.rmtree(folder, ignore_errors=True)


def _claim(cache: Path, key: str, stack: ExitStack) -> Path | None:
    """Return the locked folder of a key, None if another process has it."""
    path = keyed_folder(cache, key)
    path.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):  # another process has just removed it
        if stack.enter_context(hold_lock(path / LOCK)):
            return path
    return None


def keyed_folder(cache: Path, key: str) -> Path:
    """Return the partial folder of a key, whether it exists or not."""
    return cache / f"{PARTIAL}{key[:PREFIX]}"


def _new_name(folder: Path) -> Path:
    return folder / f"{PARTIAL}{secrets.token_hex(8)}"


def _last_written(path: Path) -> float:
    try:
        return max(item.stat().st_mtime for item in (path, *path.rglob("*")))
    except OSError:  # another process is removing it
        return time.time()


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, last of all, with the digests of the files in the folder.

    All files are on the disk before it.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        entry = {**size_and_hash(path), "written_ns": path.stat().st_mtime_ns}
        files[path.relative_to(folder).as_posix()] = {**entry, "blocks": _hash_blocks(path)}
    meta = {**meta, "files": files}
    write_json(folder / "meta.json", {**meta, "digest": _digest(meta)})
    sync_folder(folder)


def _digest(meta: dict[str, Any]) -> str:
    """Return the SHA-256 of meta.json without its own digest."""
    own = {key: value for key, value in meta.items() if key != "digest"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _hash_blocks(path: Path) -> str:
    """Return the SHA-256 of blocks spread evenly over a file, the first and the last among them."""
    digest, last = hashlib.sha256(), max(0, path.stat().st_size - BLOCK_BYTES)
    with open_regular(path) as file:
        for number in range(BLOCKS):
            file.seek(last * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def find_cache_damage(folder: Path, fingerprint: str) -> str | None:
    """Return what is wrong with a prepared corpus, None if it is complete."""
    meta = read_json(folder / "meta.json")
    if meta is None:
        return "meta.json is missing or cannot be read"
    if meta.get("digest") != _digest(meta):
        return f"the content of {folder / 'meta.json'} has changed"
    files = meta.get("files")
    if meta.get("fingerprint") != fingerprint or not isinstance(files, dict):
        return "meta.json belongs to other data"
    if extra := sorted({path.name for path in folder.glob("*.bin")} - files.keys()):
        return f"{extra[0]} is not in meta.json"
    try:
        found = (_file_damage(folder / name, entry) for name, entry in files.items())
        return next((damage for damage in found if damage is not None), None)
    except (OSError, LookupError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def _file_damage(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    status = path.stat()
    if status.st_size != entry["bytes"]:
        return f"{path} has {status.st_size} bytes, {entry['bytes']} expected"
    whole = status.st_size <= HASHED_BYTES or status.st_mtime_ns != entry["written_ns"]
    same = sha256(path) == entry["sha256"] if whole else _hash_blocks(path) == entry["blocks"]
    return None if same else f"the content of {path} has changed"


def read_meta(folder: Path) -> dict[str, Any]:
    """Return meta.json of a complete corpus.

    Raises:
        DataError: if it cannot be read: `find_cache_damage` refuses a file that is not there.
    """
    if (meta := read_json(folder / "meta.json")) is None:
        raise DataError(
            f"{folder / 'meta.json'} cannot be read; remove {folder} to prepare it again"
        )
    return meta


def install(partial: Path, cache: Path, fingerprint: str) -> None:
    """Rename a finished folder into place.

    A complete folder of another process stays; a damaged one is replaced.

    Raises:
        OSError: if the folder cannot be renamed.
    """
    folder = entry_path(cache, fingerprint)
    while find_cache_damage(folder, fingerprint) is not None:
        if folder.exists():
            grave = _new_name(cache)  # files that another process maps stay until it has finished
            with suppress(FileNotFoundError):  # another process renamed it first
                folder.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)
        try:
            partial.rename(folder)
            sync_folder(cache)
            return
        except OSError:
            if not folder.exists():
                raise


def find_request(cache: Path, key: str) -> dict[str, Any] | None:
    """Return the answer to an earlier request of the same key, None if there is none."""
    content = read_json(cache / "requests" / f"{key}.json")
    return content if content and {"fingerprint", "duplicates"} <= content.keys() else None


def find_prepared(cache: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the answer to any request for a complete corpus, None if there is none."""
    if find_cache_damage(entry_path(cache, fingerprint), fingerprint) is not None:
        return None
    keys = sorted(path.stem for path in (cache / "requests").glob("*.json"))
    answers = (find_request(cache, key) for key in keys)
    return next((a for a in answers if a is not None and a["fingerprint"] == fingerprint), None)


def save_request(cache: Path, key: str, content: dict[str, Any]) -> None:
    """Write down which corpus answers a request."""
    folder = cache / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{key}.json", content, shared=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, None if the file is missing or damaged."""
    try:
        return read_object(path, "it is written again")
    except MuonscaleError:
        return None
