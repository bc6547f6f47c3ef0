"""Which runs of a study are with Slurm: `slurm.json` in its folder, {name, jobs: {run: job}}.

All jobs of a study have its name in the queue, and are submitted held. A job begins once it is in the
ledger: what a study that was killed while submitting has left in the queue has done nothing.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from muonscale.lab.files import write_json
from muonscale.lab.studies.execute.folder import read_study_file
from muonscale.lab.studies.execute.slurm.queue import ON_A_NODE, NoAnswer, queued

FILE = "slurm.json"


class Ledger:
    """The jobs of a study that have not been seen to end.

    Args:
        folder: of the study. Its ledger is read; one that is not there is written with the first job.

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
        """Job by run."""
        return self._jobs

    def write(self) -> None:
        """Write it down, whole or not at all."""
        write_json(self._path, {"name": self.name, "jobs": self._jobs})

    def add(self, jobs: Mapping[str, str]) -> None:
        """Write down that runs have these jobs."""
        self._jobs |= jobs
        self.write()

    def drop(self, run: str) -> None:
        """Write down that a run has no job any more."""
        if self._jobs.pop(run, None) is not None:
            self.write()


def runs_begun(folder: Path, runs: Collection[str]) -> dict[str, str]:
    """Return which of these runs Slurm has begun, each with what there is to say of it.

    Slurm is asked only if one of them has a job. Where it does not answer, all that have one are
    returned, and why.
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
        found = queued(ledger.name)
    except NoAnswer as error:
        return {run: f"or waiting, or gone: job {job}; {error}" for run, job in ours.items()}
    return {run: "" for run, job in ours.items() if job in found and found[job].state in ON_A_NODE}
