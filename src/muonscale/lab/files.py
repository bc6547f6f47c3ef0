"""Files of run and study folders: atomic writes, bounded reads, and the lock of a folder."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import re
import secrets
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, ClassVar

try:
    import fcntl
except ModuleNotFoundError as missing:
    raise ImportError(
        "muonscale.lab locks files with fcntl, which Windows lacks; use Linux, macOS or WSL"
    ) from missing

from muonscale.errors import CheckpointError, ConfigError, MuonscaleError, shown

ATTEMPTS = 10
"""How often a lock is asked for, within half a second."""

LARGEST = 2**28
"""Largest file in bytes that is read whole: YAML, JSON and text files of people and programs."""

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How a URL begins; `Path` makes one slash of two. A folder whose name ends in a colon is ./NAME:/.
"""
NO_URL = (
    "it is a URL, and only data.path reads URLs; give a path of this machine, and copy from and to "
    "an object store with its own program, such as `aws s3 sync`, `gcloud storage rsync` or "
    "`hf download`"
)


def check_local(path: object, name: str) -> None:
    """Refuse a URL where a path is wanted, which would become a folder named `s3:`.

    Raises:
        ConfigError: if `path` is a URL; the message begins with `name`.
    """
    if is_url(path):
        raise ConfigError(f"{name} {path}: {NO_URL}")


def is_url(path: object) -> bool:
    """Return whether a value is a text or a path that begins as a URL does."""
    return isinstance(path, str | Path) and URL.match(str(path)) is not None


def write_atomic(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Write a file so that it is either the old one or the new one, whenever the power fails.

    Args:
        path: the file.
        content: its whole content; text is written as UTF-8.
        shared: whether several processes may write it at once, as in the cache. The last one then
            wins. Otherwise what a killed process leaves is overwritten by the next.

    Raises:
        OSError: with the path, if it cannot be written; nothing is left of it.
    """
    own = f".{secrets.token_hex(8)}" if shared else ""
    temporary = path.with_name(f".{path.name}{own}.tmp")
    handle = _open_for_writing(temporary, os.O_TRUNC)
    try:
        with name_in_errors(path), os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()  # a full disk needs the room
        raise


@contextmanager
def name_in_errors(path: Path) -> Generator[None]:
    """Add a path to an OSError that has none, as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _open_for_writing(path: Path, flags: int) -> int:
    """Open or create a file; a pipe is refused, where `open` waits for its reader."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o666)
    try:
        _check_mode(path, os.fstat(handle).st_mode)
    except OSError:
        os.close(handle)
        raise
    return handle


def free_space(folder: Path) -> str:
    """Return how much the file system of a folder can still take, for a message."""
    facts = os.statvfs(folder)
    few = facts.f_files and facts.f_favail < 1000  # some file systems count no files
    files = f" and {facts.f_favail} files" if few else ""
    return f"{facts.f_bavail * facts.f_frsize:,} bytes{files} are free there"


def append_line(path: Path, line: str) -> None:
    """Add a line to the end of a file; the file is created if necessary."""
    handle = _open_for_writing(path, os.O_APPEND)
    with name_in_errors(path), os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(line)


def write_json(path: Path, value: Any, *, shared: bool = False) -> None:
    """Write a value as indented JSON, as `write_atomic` does."""
    write_atomic(path, json.dumps(value, indent=2) + "\n", shared=shared)


def to_json(value: Any) -> str:
    """Return a value as indented JSON; a number that is not finite is null."""
    return json.dumps(drop_nonfinite(value), indent=2)


class UnusualFileError(OSError):
    """A device, a pipe or a socket, or a file that is far larger than it should be."""

    def __init__(self, reason: str, path: Path) -> None:
        super().__init__(errno.EINVAL, reason, str(path))

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"

    def __reduce__(self) -> tuple[type[UnusualFileError], tuple[str, Path]]:
        return type(self), (str(self.strerror), Path(self.filename))


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Unlike `open`, it does not wait for a writer of a pipe, and does not read devices.

    Raises:
        OSError: if the file cannot be opened.
        UnusualFileError: if it is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_mode(path, os.fstat(handle).st_mode)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_regular(path: Path) -> None:
    """Check a file that another library will open.

    Raises:
        OSError: if there is no such file.
        UnusualFileError: if it is not a regular file.
    """
    _check_mode(path, path.stat().st_mode)


def _check_mode(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise UnusualFileError("is a device, a pipe or a socket and not a regular file", path)


def check_folder(folder: Path) -> None:
    """Check the files of a folder that another library will read.

    Raises:
        OSError: if the folder cannot be read.
        UnusualFileError: if an entry is a device, a pipe or a socket, or a JSON file is too large.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir():
            check_regular(path)
            if path.suffix == ".json":
                _check_size(path, path.stat().st_size, LARGEST)


def _check_size(path: Path, size: int, at_most: int) -> None:
    if size > at_most:
        raise UnusualFileError(f"has {size:,} bytes; at most {at_most:,} are read", path)


def read_bytes(path: Path, at_most: int = LARGEST) -> bytes:
    """Return the content of a regular file that has `at_most` bytes or fewer.

    Raises:
        OSError: if the file cannot be read.
        UnusualFileError: if it is not a regular file, or too large.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        _check_size(path, size, at_most)
        return file.read(size or at_most)  # memory is allocated for all of it; in /proc size is 0


def read_text(path: Path, at_most: int = LARGEST, errors: str = "strict") -> str:
    """Return the content of a UTF-8 file; errors as for `read_bytes`, and UnicodeDecodeError."""
    return read_bytes(path, at_most).decode("utf-8", errors)


class PlainUnpickler(pickle._Unpickler):
    """Reads the pickle of a stranger: plain values, and what `find_class` of a subclass allows.

    The faster unpickler in C allocates as much as the number of a memo entry says, tens of
    gigabytes for one damaged byte; this one, in Python, only what the file is long.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every class and function.

        Raises:
            pickle.UnpicklingError: always.
        """
        raise pickle.UnpicklingError(f"it is a pickle with {module}.{name}, which is not read")

    def _refuse_bytearray(self) -> None:
        """Refuse what is allocated before it is read, at a length that the file only claims."""
        raise pickle.UnpicklingError("it is a pickle with a bytearray, which is not read")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _refuse_bytearray,
    }


def sha256(path: Path) -> str:
    """Return the SHA-256 of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyrefly: ignore


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, so that a rename outlasts a power failure."""
    _sync(folder)


def sync_tree(folder: Path) -> None:
    """Write all files of a folder and their names to the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def hold_lock(path: Path) -> Generator[bool]:
    """Create a file and lock it, for `is_locked`, and yield whether it is locked now.

    It is not if another process holds the lock or removed the file, or on a file system without
    locks.
    """
    with os.fdopen(_open_for_writing(path, 0), "w") as file:
        held = False
        with suppress(OSError):
            held = _lock(file) and os.path.samestat(os.fstat(file.fileno()), path.stat())
        yield held


def size_and_hash(path: Path) -> dict[str, Any]:
    """Return the size and the SHA-256 of a file, as manifests have them."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def read_object(
    path: Path, remedy: str, error: type[MuonscaleError] = CheckpointError
) -> dict[str, Any] | None:
    """Return the JSON object in a file, None if there is no file.

    Args:
        path: the file.
        remedy: what the user can do about a damaged file.
        error: class of the error for a damaged file.

    Raises:
        MuonscaleError: of that class, if the file does not hold a JSON object.
    """
    try:
        tree = json.loads(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as reason:
        if not isinstance(reason, UnusualFileError):  # the file may be as it should be
            remedy = "see to it that the file can be read, and try again"
        raise error(f"{path} cannot be read: {reason}; {remedy}") from reason
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} cannot be read: {reason}; {remedy}") from reason
    if not isinstance(tree, dict):
        raise error(f"{path} holds {shown(tree, 60)} and not a JSON object; {remedy}")
    return tree


def drop_nonfinite(value: Any) -> Any:
    """Return plain values with None for every number that is not finite, as JSON needs it."""
    if isinstance(value, dict):
        return {key: drop_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [drop_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def lock_folder(
    folder: Path, name: str, *, busy: str, choose: str, error: type[MuonscaleError]
) -> Generator[None]:
    """Lock a folder against other processes; the folder is created if necessary.

    A folder created here is removed again if it holds nothing but the lock at the end.

    Args:
        folder: the folder.
        name: file in it that is locked.
        busy: what another process that holds the lock does, and what the user can do about it.
        choose: how to choose another folder.
        error: class of the errors.

    Raises:
        MuonscaleError: if another process holds the lock, or the file system has no locks.
    """
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(_open_for_writing(folder / name, 0), "w")
    except OSError as reason:
        raise error(
            f"{folder} cannot be written: {reason}; choose another with {choose}"
        ) from reason
    with file:
        try:
            locked = _lock(file)
        except OSError as reason:
            raise error(
                f"the file system of {folder} does not lock files ({reason.strerror}); mount it "
                f"with locks (Lustre: -o flock), or choose a folder on another with {choose}"
            ) from reason
        if not locked:
            raise error(f"another process is {busy}")
        try:
            yield
        finally:
            if created and [path.name for path in folder.iterdir()] == [name]:
                (folder / name).unlink()
                folder.rmdir()


def _lock(file: IO[str]) -> bool:
    """Lock a file, and return whether that worked: `is_locked` holds a lock for a moment."""
    for _ in range(ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock on a file, on any machine that shares its locks."""
    try:
        with open_regular(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks: `lock_folder` refuses the latter
        return False
    return False
