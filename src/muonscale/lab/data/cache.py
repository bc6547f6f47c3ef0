"""The cache of prepared corpora: finds a corpus, checks it, and puts a new one into place.

    CACHE/requests/KEY.json     settings and file states -> fingerprint
    CACHE/FINGERPRINT/          token shards, tokenizer/, and meta.json with every file's size

A folder is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from muonscale.errors import DataError, MuonscaleError
from muonscale.lab.files import read_object, write_json

PARTIAL = ".partial-"
# A partial folder is left over from a killed process if nothing was written in it for this long.
STALE_SECONDS = 24 * 3600
PREFIX = 16


def cache_folder(chosen: Path | None) -> Path:
    """Return data.cache, else $MUONSCALE_CACHE, else muonscale in the user's cache folder."""
    if chosen is not None:
        return chosen.expanduser()
    if value := os.environ.get("MUONSCALE_CACHE"):
        return Path(value).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "muonscale"


def cache_error(cache: Path, error: OSError) -> DataError:
    """Return the error for a cache folder that cannot be written."""
    return DataError(
        f"prepared tokens cannot be written to {cache}: {error.strerror or error}; choose another "
        "folder with data.cache=FOLDER"
    )


def entry_path(cache: Path, fingerprint: str) -> Path:
    """Return the folder of a prepared corpus, whether it exists or not."""
    return cache / fingerprint[:PREFIX]


def new_partial(cache: Path) -> Path:
    """Create a folder for this process to write into, and remove those of killed processes."""
    cache.mkdir(parents=True, exist_ok=True)
    for path in cache.glob(PARTIAL + "*"):
        if time.time() - _last_written(path) > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    path = _new_name(cache)
    path.mkdir()  # not by tempfile: a cache may be shared, so the umask decides who reads it
    return path


def _new_name(folder: Path) -> Path:
    return folder / f"{PARTIAL}{secrets.token_hex(8)}"


def _last_written(path: Path) -> float:
    try:
        return max(item.stat().st_mtime for item in (path, *path.rglob("*")))
    except OSError:  # another process is removing it
        return time.time()


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, last of all, with the sizes of the files in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_json(folder / "meta.json", {**meta, "files": sizes})


def find_cache_damage(folder: Path, fingerprint: str) -> str | None:
    """Return what is wrong with a prepared corpus, None if it is complete."""
    meta = _read_json(folder / "meta.json")
    if meta is None:
        return "meta.json is missing or cannot be read"
    if meta.get("fingerprint") != fingerprint or not isinstance(meta.get("files"), dict):
        return "meta.json belongs to other data"
    for name, size in meta["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            return f"{name} {state}, {size} bytes expected"
    return None


def read_meta(folder: Path) -> dict[str, Any]:
    """Return meta.json of a complete corpus."""
    meta = _read_json(folder / "meta.json")
    assert meta is not None
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
            return
        except OSError:
            if not folder.exists():
                raise


def find_request(cache: Path, key: str) -> dict[str, Any] | None:
    """Return the answer to an earlier request of the same key, None if there is none."""
    content = _read_json(cache / "requests" / f"{key}.json")
    return content if content and {"fingerprint", "duplicates"} <= content.keys() else None


def save_request(cache: Path, key: str, content: dict[str, Any]) -> None:
    """Write down which corpus answers a request."""
    folder = cache / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = _new_name(folder)  # of this process alone, unlike that of `write_json`
    write_json(temporary, content)
    temporary.replace(folder / f"{key}.json")


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, None if the file is missing or damaged."""
    try:
        return read_object(path, "it is written again")
    except MuonscaleError:
        return None
