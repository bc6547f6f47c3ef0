"""The files of a corpus: what `data.path` names, without what is hidden, ignored or excluded."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from muonscale.errors import DataError
from muonscale.lab.config.sections import DataSection
from muonscale.lab.files import check_regular, open_regular, read_text

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

IGNORE_FILE = ".gitignore"
IGNORED, EXCLUDED = "ignored by .gitignore", "excluded by data.include or data.exclude"


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus."""

    name: str
    """Its path below the folder that was given, or its own name."""
    place: str
    """Path or URL."""
    named: bool
    """Whether it was given itself, and not found in a folder or by a pattern."""
    system: Any = None
    """The fsspec file system of a URL; None for a local file."""

    def open(self) -> BinaryIO:
        """Open it for reading. Raises OSError."""
        if self.system is None:
            return open_regular(Path(self.place))
        return self.system.open(self.place, "rb")

    def state(self) -> list[Any]:
        """Return name, size in bytes, and what changes with the content. Raises OSError."""
        if self.system is not None:
            return [self.name, int(self.system.size(self.place)), self.system.ukey(self.place)]
        check_regular(Path(self.place))
        status = Path(self.place).stat()
        return [self.name, status.st_size, status.st_mtime_ns]


@dataclass
class SkippedFiles:
    """What of a corpus is not read, by the reason."""

    examples: dict[str, str] = field(default_factory=dict)
    """The first file that was left out."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many were."""

    def add(self, reason: str, name: str) -> None:
        """Count a file."""
        self.examples.setdefault(reason, name)
        self.counts[reason] = self.counts.get(reason, 0) + 1

    def __str__(self) -> str:
        parts = (f"{count} {why} ({self.examples[why]})" for why, count in self.counts.items())
        return f"{sum(self.counts.values())} files left out: {', '.join(parts)}"


@dataclass(frozen=True)
class Patterns:
    """Which names of a corpus are read: `data.include` and `data.exclude`, as in .gitignore."""

    include: GitIgnoreSpec
    exclude: GitIgnoreSpec

    @classmethod
    def of(cls, data: DataSection) -> Patterns:
        """Return those of a data section.

        Raises:
            DataError: for a pattern that cannot be read.
        """
        return cls(*(_spec(lines, f"data.{key}") for key, lines in pattern_lists(data).items()))

    def excludes(self, name: str) -> bool:
        """Return whether a file is left out; a folder's name ends with a slash."""
        wanted = name.endswith("/") or not len(self.include) or self.include.match_file(name)
        return not wanted or self.exclude.match_file(name)


def pattern_lists(data: DataSection) -> dict[str, list[str]]:
    """Return the patterns of a data section by key."""
    return {"include": data.include, "exclude": data.exclude}


def _spec(lines: list[str], key: str) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec

    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise DataError(f"{key}: {error}") from error


def find_files(data: DataSection) -> tuple[list[CorpusFile], SkippedFiles]:
    """Return the files that `data.path` names, those of a folder sorted, and what is left out.

    Raises:
        DataError: if a path is missing or cannot be read, a pattern matches nothing, or no file
            remains.
    """
    files: dict[str, CorpusFile] = {}
    left_out = SkippedFiles()
    patterns = Patterns.of(data)
    for given in data.paths:
        find = _find_remote if "://" in given else _find_local
        for file in find(given, data, patterns, left_out):
            files.setdefault(file.place, file)
    if not files:
        why = f"; {left_out}" if left_out.counts else " (hidden files are skipped)"
        raise DataError(f"data.path={data.title} holds no files{why}")
    return list(files.values()), left_out


def _find_local(
    given: str, data: DataSection, patterns: Patterns, left_out: SkippedFiles
) -> Iterator[CorpusFile]:
    path = Path(given).expanduser()
    is_pattern = glob.has_magic(given) and not path.exists()
    # Path.glob takes no absolute pattern.
    matched = sorted(glob.glob(str(path), recursive=True)) if is_pattern else [str(path)]  # noqa: PTH207
    if not matched:
        raise DataError(f"data.path={given} matches no file")
    for path in map(Path, matched):
        mode = _mode(path, "data.path")
        if stat.S_ISREG(mode):
            if is_pattern and patterns.excludes(path.name):
                left_out.add(EXCLUDED, path.name)
                continue
            yield CorpusFile(path.name, str(path), named=not is_pattern)
        elif stat.S_ISDIR(mode):
            keep = _Keep(path, patterns, left_out, with_ignore_files=data.gitignore)
            for file in sorted(walk(path, "data.path", keep)):
                yield CorpusFile(file.relative_to(path).as_posix(), str(file), named=False)
        elif not is_pattern:
            raise DataError(f"data.path={path} is neither a file nor a folder")


def _mode(path: Path, key: str) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        raise unreadable(path, error, key) from error


def _find_remote(
    given: str, data: DataSection, patterns: Patterns, left_out: SkippedFiles
) -> Iterator[CorpusFile]:
    import fsspec

    try:
        system, path = fsspec.url_to_fs(given)
        named = system.isfile(path)
        found = [path] if named else system.glob(path) if glob.has_magic(path) else [path]
        files = [file for item in found for file in system.find(item)]
    except Exception as error:  # the file systems' errors have no common base
        raise DataError(
            f"data.path={given} cannot be read: {error or type(error).__name__}"
        ) from error
    if not files:
        raise DataError(f"data.path={given}: there is no such file or folder")
    base = path.rstrip("/") + "/"
    for file in sorted(files):
        name = file.removeprefix(base) if file.startswith(base) else file.rsplit("/", 1)[-1]
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if not named and patterns.excludes(name):
            left_out.add(EXCLUDED, name)
            continue
        yield CorpusFile(name, file, named, system)


class _Keep:
    """Whether a file or folder below `top` is read; it counts what is not."""

    def __init__(
        self, top: Path, patterns: Patterns, left_out: SkippedFiles, *, with_ignore_files: bool
    ) -> None:
        self._top, self._patterns, self._left_out = top, patterns, left_out
        self._reads_ignore_files = with_ignore_files
        self._specs: dict[Path, list[tuple[Path, GitIgnoreSpec]]] = {}
        """The ignore files that hold in a folder, the outermost first."""

    def __call__(self, path: Path, *, is_folder: bool) -> bool:
        slash = "/" if is_folder else ""
        name = path.relative_to(self._top).as_posix()
        excluded = self._patterns.excludes(name + slash)
        if not excluded and not self._is_ignored(path, slash):
            return True
        self._left_out.add(EXCLUDED if excluded else IGNORED, name + slash)
        return False

    def _is_ignored(self, path: Path, slash: str) -> bool:
        for folder, spec in reversed(self._ignore_files(path.parent)):  # the innermost decides
            matched = spec.check_file(path.relative_to(folder).as_posix() + slash).include
            if matched is not None:
                return matched
        return False

    def _ignore_files(self, folder: Path) -> list[tuple[Path, GitIgnoreSpec]]:
        if not self._reads_ignore_files:
            return []
        if folder not in self._specs:
            above = [] if folder == self._top else self._ignore_files(folder.parent)
            path = folder / IGNORE_FILE
            try:
                lines = read_text(path, errors="replace").splitlines()
            except FileNotFoundError:
                own = []
            except OSError as error:
                raise unreadable(path, error, "data.path") from error
            else:
                own = [(folder, _spec(lines, str(path)))]
            self._specs[folder] = above + own
        return self._specs[folder]


def walk(
    top: Path, key: str, keep: Callable[..., bool] = lambda path, *, is_folder: True
) -> Iterator[Path]:
    """Yield the files of a folder that are not hidden, in no order; a loop of links ends.

    Args:
        top: the folder.
        key: key of the configuration that names it, for errors.
        keep: called with (path, is_folder=...): whether to read it.

    Raises:
        DataError: if a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise unreadable(error.filename, error, key) from error

    for root, folders, names in os.walk(top, onerror=fail, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))

        def chosen(names: list[str], is_folder: bool, folder: Path = Path(root)) -> Iterator[Path]:
            paths = (folder / name for name in names if not name.startswith("."))
            return (path for path in paths if keep(path, is_folder=is_folder))

        folders[:] = [path.name for path in chosen(folders, True)]
        yield from chosen(names, False)


def file_states(path: Path, key: str) -> list[list[Any]]:
    """Return name, size in bytes and modification time in nanoseconds of a file or of a folder's.

    Args:
        path: the file or folder.
        key: key of the configuration that names it, for errors.

    Raises:
        DataError: if it cannot be read, or contains anything but folders and regular files.
    """
    path = path.expanduser()
    if not stat.S_ISDIR(_mode(path, key)):
        return read_states([CorpusFile(path.name, str(path), named=True)], key)
    return read_states(
        [
            CorpusFile(file.relative_to(path).as_posix(), str(file), named=False)
            for file in sorted(walk(path, key))
        ],
        key,
    )


def read_states(files: list[CorpusFile], key: str) -> list[list[Any]]:
    """Return the state of every file; arguments and errors as for `file_states`."""
    states = []
    for file in files:
        try:
            states.append(file.state())
        except OSError as error:
            raise unreadable(file.place, error, key) from error
    return states


def unreadable(place: str | Path, error: OSError, key: str = "data.path") -> DataError:
    """Return the error for a file that cannot be read."""
    return DataError(f"{place} cannot be read: {error.strerror or error} ({key})")
