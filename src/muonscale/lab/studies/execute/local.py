"""Runs in this process, or in several processes of this machine."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stdout, suppress

from muonscale.lab.studies.execute.job import Ended, Job
from muonscale.lab.studies.execute.worker import record_death, start_worker, train_run

GRACE = 120.0
"""Seconds that a run has to save itself when the study is stopped."""


class Inline:
    """Does one job after the other in this process."""

    def run(self, jobs: Sequence[Job], ended: Ended) -> None:
        """Do all jobs.

        Raises:
            KeyboardInterrupt, SystemExit: after a signal, once the current run has saved itself.
        """
        for job in jobs:
            with job.log.open("a", encoding="utf-8") as log, redirect_stdout(log):
                code = train_run(job.config, job.failure)
            if code >= 128:
                raise SystemExit(code)
            ended(job.id)


class LocalPool:
    """Does several jobs at a time in processes of this machine.

    Args:
        workers: jobs at a time.
        threads: CPU threads of each.
        gpus: from `visible_gpus`. Each worker has one of them; more workers than GPUs share them.
    """

    def __init__(self, workers: int, threads: int, gpus: Sequence[str] = ()) -> None:
        self._workers, self._threads, self._gpus = workers, threads, gpus
        self._lock, self._stopping = threading.Lock(), False
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, jobs: Sequence[Job], ended: Ended) -> None:
        """Do all jobs; when interrupted, ask the running ones to save themselves."""
        left: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            left.put(job)
        number = min(self._workers, len(jobs))
        with ThreadPoolExecutor(number) as pool, self._stop_processes_on_exit():
            work = [pool.submit(self._work, slot, left, ended) for slot in range(number)]
            for done in as_completed(work):
                done.result()

    def _work(self, slot: int, left: queue.SimpleQueue[Job], ended: Ended) -> None:
        """Do jobs in a process, in a new one if it dies, until none is left."""
        process = None
        while not self._stopping:
            try:
                job = left.get_nowait()
            except queue.Empty:
                break
            process = process or self._start(slot)
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

    def _start(self, slot: int) -> subprocess.Popen[str] | None:
        """Return a process that waits for jobs, None if the study is being stopped."""
        with self._lock:
            if self._stopping:
                return None
            # A session of its own: Ctrl-C is for the study, which passes it on.
            gpu = self._gpus[slot % len(self._gpus)] if self._gpus else None
            process = start_worker(
                self._threads, gpu, stdout=subprocess.PIPE, start_new_session=True
            )
            self._processes.append(process)
        return process

    def _do(self, job: Job, process: subprocess.Popen[str]) -> bool:
        """Have a job done; return True if it has ended, False if it was stopped."""
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # a process that has died gives no answer
            process.stdin.write(json.dumps(job.files) + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        if answer:
            return int(answer) < 128
        code = process.wait()
        if self._stopping or code >= 128:
            return False
        record_death(job.failure, code, str(job.log))
        return True

    @contextmanager
    def _stop_processes_on_exit(self) -> Generator[None]:
        """Stop the processes with the study, and wait until they have saved their runs."""
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
    """Close the input of a process, which ends it, and wait until it is gone."""
    with suppress(BrokenPipeError), process:
        pass
