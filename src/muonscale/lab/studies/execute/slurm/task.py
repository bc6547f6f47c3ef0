"""A task of a job array: it does one run, in a process of its own.

Slurm sends a signal some time before it takes a node away, for the job's time limit or for a more
urgent job. submitit (https://github.com/facebookincubator/submitit, docs/checkpointing.md) then
calls `checkpoint` and has Slurm queue the job again. Meanwhile the run saves itself on SIGTERM, at
the end of a step, which it could not do within a signal handler of its own process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission

from muonscale.lab.studies.execute.slurm.queue import NoAnswer, state_of
from muonscale.lab.studies.execute.worker import record_death, start_worker

TO_STOP = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a run to save itself."""


class Task:
    """Does a run in a worker process when called; submitit can checkpoint it.

    Args:
        threads: CPU threads of the run.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._worker: int | None = None

    def __call__(self, files: Mapping[str, str]) -> None:
        """Do or resume a run.

        Args:
            files: paths of config, log and failure, as the worker takes them.

        Raises:
            SystemExit: if Slurm ends the job, and the run has saved itself.
        """
        with _block(_notice()):
            process = start_worker(self._threads, stdout=subprocess.DEVNULL)
            self._worker = process.pid
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as lines:
            lines.write(json.dumps(dict(files)) + "\n")
        _wait(process.pid)
        with _block(_notice()):
            code = process.wait()
            self._worker = None
        if code >= 128 or -code in TO_STOP:
            _leave()
        elif code:
            record_death(Path(files["failure"]), code, files["log"])

    def checkpoint(self, files: Mapping[str, str]) -> DelayedSubmission:
        """Have the run save itself, and return the work of the job when Slurm begins it again.

        submitit calls this within a signal handler, while `__call__` waits.
        """
        if self._worker is not None:
            with suppress(ProcessLookupError):
                os.kill(self._worker, signal.SIGTERM)
            _wait(self._worker)
        return DelayedSubmission(Task(self._threads), files)


def _notice() -> signal.Signals:
    """Return the signal that submitit has Slurm send before the end."""
    return signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]


@contextmanager
def _block(number: signal.Signals) -> Generator[None]:
    """Defer a signal; a process started meanwhile never receives it.

    Slurm sends it to all processes of a step, and it would end the worker.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _wait(pid: int) -> None:
    """Wait for the end of a child without collecting its exit code: unlike Popen.wait, this may be
    called within a signal handler that has interrupted it."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _leave() -> None:
    """Leave after a run that was asked to stop.

    Slurm asks before it ends a job. It requeues a preempted job, but not a cancelled one. If Slurm
    has not ended the job yet, as in the time it grants a preempted one, the job queues itself
    again.
    """
    try:
        runs_on = state_of(JobEnvironment().job_id) == "RUNNING"
    except NoAnswer as error:
        print(f"Slurm cannot be asked about this job: {error}", file=sys.stderr, flush=True)
        runs_on = False
    if runs_on:
        os.kill(os.getpid(), _notice())  # submitit's handler does the rest, and leaves
    sys.exit(128 + signal.SIGTERM)
