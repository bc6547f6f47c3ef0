"""Which tasks of lm-evaluation-harness are run, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from muonscale.lab.evaluation.suites import Suite


@dataclass(frozen=True)
class Request:
    """A task to be run."""

    task: str
    """Task, group or tag of the harness."""
    shots: int | None = None
    """Examples in the prompt; those of the task when None."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How tasks are run."""

    include: Path | None = None
    """Folder of task files of the user's own."""
    limit: int | None = None
    """Documents of a task at most; all when None."""
    batch_size: int = 8
    """Sequences that the model takes at once."""
    run_code: bool = False
    """Whether code that the model writes may be run."""


def requests_of(suite: Suite, tasks: tuple[str, ...]) -> list[Request]:
    """Return the tasks of a suite, or those of it that are named."""
    return [Request(each.task, each.shots) for each in suite.chosen(tasks)]
