"""Jobs in Slurm's queue, seen and changed through its own commands.

A job is named `12_3`, the fourth of array 12, or `12` where there is no array.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from muonscale.errors import StudyError

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")

ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
"""States of a job that has ended; in all others it runs or is going to."""

ON_A_NODE = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
"""States of a job that has begun."""

PATIENCE = 60
"""Most seconds that a command may take."""


class NoAnswer(StudyError):
    """Slurm does not answer; it may answer later."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue."""

    state: str
    """Such as PENDING; https://slurm.schedmd.com/squeue.html lists them."""
    reason: str
    """Why the job waits or has ended."""

    @property
    def alive(self) -> bool:
        """Whether it runs or is going to."""
        return self.state not in ENDED


def check_commands() -> None:
    """Check that this machine has Slurm.

    Raises:
        StudyError: naming the command that is missing.
    """
    for command in COMMANDS:
        if shutil.which(command) is None:
            raise StudyError(
                f"executor.kind=slurm: there is no {command} on this machine; start the study on a "
                "machine from which the cluster takes jobs, or set executor.kind=local"
            )


def list_jobs(name: str) -> dict[str, QueuedJob]:
    """Return this user's jobs with a name, ended ones included as long as Slurm keeps them.

    Raises:
        NoAnswer: if Slurm does not answer.
    """
    words = ["--states=all", "--array", "--format=%F|%K|%T|%r", f"--user={os.getuid()}"]
    lines = _answer("squeue", "--noheader", f"--name={name}", *words).splitlines()
    found = {}
    for line in lines:
        array, index, state, reason = line.split("|", 3)
        found[f"{array}_{index}" if index.isdigit() else array] = QueuedJob(state, reason)
    return found


def state_of(job: str) -> str:
    """Return the state of a job that is in the queue.

    Raises:
        NoAnswer: if Slurm does not answer, or no longer knows it.
    """
    return _answer("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip()


def accounted_state(job: str) -> str | None:
    """Return the state of a job in Slurm's accounting; None where there is no accounting."""
    try:
        words = ["--noheader", "--parsable2", "--allocations", "--format=State"]
        lines = _answer("sacct", f"--jobs={job}", *words).split()
    except (NoAnswer, FileNotFoundError):
        return None
    return lines[0] if lines else None  # "CANCELLED by 1000" is one of them


def release(arrays: Iterable[str]) -> None:
    """Release jobs that were submitted held.

    Raises:
        NoAnswer: if Slurm refuses or does not answer.
    """
    for array in sorted(set(arrays)):
        _answer("scontrol", "release", array)


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs.

    Raises:
        NoAnswer: if Slurm refuses or does not answer.
    """
    if given := sorted(jobs):
        _answer("scancel", *given)


def array_of(job: str) -> str:
    """Return the array that a job belongs to."""
    return job.partition("_")[0]


def _answer(*words: str) -> str:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=PATIENCE, check=False, encoding="utf-8"
        )
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"{words[0]} has not answered for {PATIENCE} seconds") from error
    if done.returncode:
        raise NoAnswer(f"{' '.join(words)}: {done.stderr.strip() or f'code {done.returncode}'}")
    return done.stdout
