"""A run to be done, and the protocol of what does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from muonscale.errors import StudyError
from muonscale.lab.files import read_object
from muonscale.lab.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """One run to be done."""

    id: str
    folder: RunFolder
    config: Path
    """The resolved configuration, whose `run.path` is the folder."""
    log: Path
    failure: Path
    """The file to write the reason of a failure to."""

    @property
    def done(self) -> bool:
        """Whether the run has a result, or a reason for having none."""
        return self.failure.exists() or self.folder.result() is not None

    @property
    def files(self) -> dict[str, str]:
        """The absolute paths that a worker needs."""
        paths = {"config": self.config, "log": self.log, "failure": self.failure}
        return {name: str(path.absolute()) for name, path in paths.items()}


Ended = Callable[[str], None]
"""Called with the id of a job that has ended, finished or not."""


class Executor(Protocol):
    """Does jobs, each once; their outcomes are in their folders."""

    def run(self, jobs: Sequence[Job], ended: Ended) -> None:
        """Do all jobs. When interrupted, let the running ones save themselves, and leave."""
        ...


def read_study_file(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file of a study, None if there is no file.

    Raises:
        StudyError: if the file is damaged.
    """
    return read_object(path, "restore it, or remove it to repeat its runs", StudyError)
