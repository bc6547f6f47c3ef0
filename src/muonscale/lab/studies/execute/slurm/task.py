"""What a task of a job array does: one run, in a process of its own.

Slurm sends a signal some time before it takes a node away, be it for the job's time limit or for a job
that is more urgent. submitit (https://github.com/facebookincubator/submitit, docs/checkpointing.md)
then calls `checkpoint`, and has Slurm queue the job again. The run is to save itself meanwhile, which
it does on SIGTERM, at the end of a step: it cannot within a signal handler of its own process.
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
from muonscale.lab.studies.execute.worker import record_failure

WORKER = ("-m", "muonscale.lab.studies.execute.worker")

TO_STOP = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a run to save itself."""


class Task:
    """Does a run when called, by way of a worker process; a callable that submitit can checkpoint.

    Args:
        threads: CPU threads of the run.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._worker: int | None = None

    def __call__(self, files: Mapping[str, str]) -> None:
        """Do or go on with a run.

        Args:
            files: config, log and failure, as the worker takes them.

        Raises:
            SystemExit: if Slurm ends the job, and the run has saved itself.
        """
        with _blocked(_notice()):
            process = self._start()
            self._worker = process.pid
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as lines:
            lines.write(json.dumps(dict(files)) + "\n")
        _wait(process.pid)
        with _blocked(_notice()):
            code = process.wait()
            self._worker = None
        if code >= 128 or -code in TO_STOP:
            _stopped()
        elif code:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            memory = ", as when the node has no memory left" if code == -signal.SIGKILL else ""
            reason = f"its process ended with {how}{memory}; see {files['log']}"
            record_failure(Path(files["failure"]), reason)

    def checkpoint(self, files: Mapping[str, str]) -> DelayedSubmission:
        """Have the run save itself, and return what the job does when Slurm begins it again.

        submitit calls this within a signal handler, while `__call__` waits.
        """
        if self._worker is not None:
            with suppress(ProcessLookupError):
                os.kill(self._worker, signal.SIGTERM)
            _wait(self._worker)
        return DelayedSubmission(Task(self._threads), files)

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(self._threads)},
            text=True,
        )


def _notice() -> signal.Signals:
    """Return the signal that submitit has Slurm send before the end."""
    return signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]


@contextmanager
def _blocked(number: signal.Signals) -> Generator[None]:
    """Keep a signal for later; a process started meanwhile never gets it.

    Slurm sends it to all processes of a step, and it would end the worker.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _wait(pid: int) -> None:
    """Wait for a child's end and leave its exit code to be asked for: unlike Popen.wait, this may be
    called within a signal handler that has interrupted it."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _stopped() -> None:
    """Leave after a run that was asked to stop.

    Slurm asks before it ends a job, which is then queued again if it was preempted and not if it was
    cancelled. If it has not ended the job, such as in the time that a preempted one is granted, the
    job queues itself again.
    """
    try:
        runs_on = state_of(JobEnvironment().job_id) == "RUNNING"
    except NoAnswer as error:
        print(f"Slurm cannot be asked about this job: {error}", file=sys.stderr, flush=True)
        runs_on = False
    if runs_on:
        os.kill(os.getpid(), _notice())  # submitit's handler does the rest, and leaves
    sys.exit(128 + signal.SIGTERM)
