"""Where the runs of a study are done: in this process, or in processes of this machine.

An executor is given jobs and does each of them once; what became of them is in their folders. Slurm
is another (`muonscale.lab.studies.execute.slurm.array`).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from muonscale.errors import StudyError
from muonscale.lab.studies.config import ExecutorSection
from muonscale.lab.studies.execute.worker import record_failure, train_run

GRACE = 120.0
"""Seconds that a run has to save itself when the study is stopped."""


@dataclass(frozen=True)
class Job:
    """One run to be done."""

    id: str
    config: Path
    """Resolved, with its `run.path`."""
    log: Path
    failure: Path
    """Where it is written why it failed."""


Ended = Callable[[str], None]
"""Called with the id of a job that has ended, finished or not."""


class Executor(Protocol):
    """Does jobs."""

    def run(self, jobs: Sequence[Job], ended: Ended) -> None:
        """Do all jobs. When interrupted, let the running ones save themselves, and leave."""
        ...


class Inline:
    """One job after the other, in this process."""

    def run(self, jobs: Sequence[Job], ended: Ended) -> None:
        """Do all jobs.

        Raises:
            KeyboardInterrupt: after a signal, when the run in hand has saved itself.
            SystemExit: likewise.
        """
        for job in jobs:
            with job.log.open("a", encoding="utf-8") as log, redirect_stdout(log):
                code = train_run(job.config, job.failure)
            if code >= 128:
                raise SystemExit(code)
            ended(job.id)


class LocalPool:
    """Several jobs at a time, in processes of this machine.

    Args:
        workers: jobs at a time.
        threads: of each.
    """

    def __init__(self, workers: int, threads: int) -> None:
        self._workers, self._threads = workers, threads
        self._lock, self._stopping = threading.Lock(), False
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, jobs: Sequence[Job], ended: Ended) -> None:
        """Do all jobs; an interrupted study asks the running ones to save themselves."""
        left: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            left.put(job)
        number = min(self._workers, len(jobs))
        with ThreadPoolExecutor(number) as pool, self._stopped_with_us():
            for done in as_completed([pool.submit(self._work, left, ended) for _ in range(number)]):
                done.result()

    def _work(self, left: queue.SimpleQueue[Job], ended: Ended) -> None:
        """Do jobs in a process, in a new one if it dies, until none is left."""
        process = None
        while not self._stopping:
            try:
                job = left.get_nowait()
            except queue.Empty:
                break
            process = process or self._start()
            if process is None:
                break
            if self._do(job, process):
                with self._lock:
                    ended(job.id)
            if process.poll() is not None:
                _dismiss(process)
                process = None
        if process is not None:
            _dismiss(process)

    def _start(self) -> subprocess.Popen[str] | None:
        """Return a process that waits for jobs, None if the study is being stopped."""
        words = [sys.executable, "-m", "muonscale.lab.studies.execute.worker"]
        env = os.environ | {"OMP_NUM_THREADS": str(self._threads)}
        with self._lock:
            if self._stopping:
                return None
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=env,
                text=True,
                start_new_session=True,  # Ctrl-C is for the study, which passes it on
            )
            self._processes.append(process)
        return process

    def _do(self, job: Job, process: subprocess.Popen[str]) -> bool:
        """Have a job done; return whether it has ended, rather than been stopped."""
        assert process.stdin is not None and process.stdout is not None
        files = {"config": job.config, "log": job.log, "failure": job.failure}
        try:
            process.stdin.write(json.dumps({key: str(p) for key, p in files.items()}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died, and says so below
        answer = process.stdout.readline()
        if answer:
            return int(answer) < 128
        code = process.wait()
        if self._stopping or code >= 128:
            return False
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        memory = ", as when the machine has no memory left" if code == -signal.SIGKILL else ""
        record_failure(job.failure, f"its process ended with {how}{memory}; see {job.log}")
        return True

    @contextmanager
    def _stopped_with_us(self) -> Generator[None]:
        """Stop what runs when the study is stopped, and wait until it has saved itself."""
        try:
            yield
        except BaseException:
            with self._lock:
                self._stopping = True
            for process in self._processes:
                process.terminate()
            for process in self._processes:
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
            raise


def _dismiss(process: subprocess.Popen[str]) -> None:
    """Tell a process that there are no more jobs, and wait until it is gone."""
    with suppress(BrokenPipeError), process:
        pass


def make_executor(section: ExecutorSection, folder: Path) -> Executor:
    """Return the executor that a study asks for.

    Args:
        section: `executor.*`.
        folder: of the study, for what an executor has to remember.

    Raises:
        StudyError: for options that another executor has.
    """
    if section.slurm and section.kind != "slurm":
        raise StudyError(
            f"executor.slurm is given, and executor.kind={section.kind}; leave it out, or set "
            "executor.kind=slurm"
        )
    if section.kind == "slurm":
        from muonscale.lab.studies.execute.slurm.array import SlurmArray

        return SlurmArray(section, folder)
    if section.kind == "inline":
        if section.workers not in (None, 1):
            raise StudyError(
                f"executor.workers={section.workers}: executor.kind=inline does one run at a time; "
                "accepted: 1, or executor.kind=local"
            )
        return Inline()
    return LocalPool(section.workers or default_workers(section.threads), section.threads)


def default_workers(threads: int) -> int:
    """Return how many runs of so many threads this process's cores hold."""
    return max(1, len(os.sched_getaffinity(0)) // threads)
