"""The runs of a study that Slurm has: `slurm.json` in its folder, {name, jobs: {run: job}}.

All jobs of a study have its name in the queue and are submitted held. A job is released once it is
in the ledger, so jobs that a study killed while submitting left in the queue have done nothing.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from muonscale.lab.files import write_json
from muonscale.lab.studies.execute.job import read_study_file
from muonscale.lab.studies.execute.slurm.queue import ON_A_NODE, NoAnswer, list_jobs

FILE = "slurm.json"


class Ledger:
    """The jobs of a study that have not been seen to end.

    Args:
        folder: the folder of the study. A ledger that does not exist is written with the first job.

    Raises:
        StudyError: if it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        found = read_study_file(self._path) or {}
        self.name: str = found.get("name", f"muonscale-{secrets.token_hex(6)}")
        self._jobs: dict[str, str] = found.get("jobs", {})

    @property
    def jobs(self) -> Mapping[str, str]:
        """Jobs by run."""
        return self._jobs

    def write(self) -> None:
        """Write the ledger, whole or not at all."""
        write_json(self._path, {"name": self.name, "jobs": self._jobs})

    def add(self, jobs: Mapping[str, str]) -> None:
        """Record the jobs of runs."""
        self._jobs |= jobs
        self.write()

    def drop(self, run: str) -> None:
        """Record that a run has no job any more."""
        if self._jobs.pop(run, None) is not None:
            self.write()


def find_begun_runs(folder: Path, runs: Collection[str]) -> dict[str, str]:
    """Return which of these runs Slurm has begun, each with a remark.

    Slurm is asked only if one of them has a job. If it does not answer, all runs with a job are
    returned, with the reason.
    """
    if not (folder / FILE).exists():
        return {}
    ledger = Ledger(folder)
    ours = {run: ledger.jobs[run] for run in runs if run in ledger.jobs}
    if not ours:
        return {}
    try:
        if shutil.which("squeue") is None:
            raise NoAnswer("there is no squeue on this machine")
        found = list_jobs(ledger.name)
    except NoAnswer as error:
        return {run: f"job {job} runs, waits or is gone: {error}" for run, job in ours.items()}
    return {run: "" for run, job in ours.items() if job in found and found[job].state in ON_A_NODE}
