"""The choice of an executor."""

from __future__ import annotations

from pathlib import Path

from muonscale.errors import StudyError
from muonscale.lab.studies.config import ExecutorSection
from muonscale.lab.studies.execute.job import Executor
from muonscale.lab.studies.execute.local import Inline, LocalPool
from muonscale.lab.studies.execute.slurm.array import SlurmArray
from muonscale.lab.studies.gpus import visible_gpus


def make_executor(section: ExecutorSection, folder: Path) -> Executor:
    """Return the executor that a study asks for.

    Raises:
        StudyError: for options of another executor.
    """
    if section.slurm and section.kind != "slurm":
        raise StudyError(
            f"executor.slurm is given, and executor.kind={section.kind}; leave it out, or set "
            "executor.kind=slurm"
        )
    if section.kind == "slurm":
        return SlurmArray(section, folder)
    if section.kind == "inline" and section.workers not in (None, 1):
        raise StudyError(
            f"executor.workers={section.workers}: executor.kind=inline does one run at a time; "
            "leave workers out, or set executor.kind=local"
        )
    workers = section.concurrent_runs
    assert workers is not None
    if section.kind == "inline":
        return Inline()
    return LocalPool(workers, section.threads, visible_gpus())
