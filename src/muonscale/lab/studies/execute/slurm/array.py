"""The runs of a study as a job array of a Slurm cluster, through submitit.

The jobs belong to the cluster: they continue when the study is stopped, and a study that is started
again waits for jobs that are still queued or running. A preempted job, or one at its time limit,
saves its run and is queued again (`muonscale.lab.studies.execute.slurm.task`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from muonscale.errors import StudyError, command_line
from muonscale.lab.studies.config import ExecutorSection
from muonscale.lab.studies.execute.job import Ended, Job
from muonscale.lab.studies.execute.slurm import queue as slurm_queue
from muonscale.lab.studies.execute.slurm.ledger import Ledger
from muonscale.lab.studies.execute.slurm.options import make_submitter
from muonscale.lab.studies.execute.slurm.queue import NoAnswer, QueuedJob, array_of
from muonscale.lab.studies.execute.worker import record_failure

POLL = 5.0
"""Seconds between looks at the queue and the run folders."""

LAG = 60.0
"""Seconds after the end of a job until its files are surely visible through the file system."""

ARRAY = 1000
"""Most tasks of an array: Slurm's own default is 1001."""

USUAL = {"None", "Resources", "Priority", "JobArrayTaskLimit", "BeginTime", "JobHeldUser"}
"""Reasons for waiting that need no message."""

HINTS = {
    "OUT_OF_MEMORY": "; raise mem_gb in executor.slurm",
    "TIMEOUT": "; the run did not save itself in the slurm_signal_delay_s seconds before its time "
    "limit",
}


class SlurmArray:
    """Does jobs as tasks of job arrays.

    Args:
        section: `executor.*`.
        folder: the folder of the study, visible to all nodes.

    Raises:
        StudyError: if submitit or Slurm is missing, or for options that cannot be used.
    """

    def __init__(self, section: ExecutorSection, folder: Path) -> None:
        self._section, self._folder = section, folder
        self._printed: set[str] = set()
        slurm_queue.check_commands()
        make_submitter(section, folder / "slurm", name="any", workers=None)

    def run(self, jobs: Sequence[Job], ended: Ended) -> None:
        """Submit the jobs that Slurm does not have yet, and wait for all.

        Raises:
            StudyError: if Slurm does not answer at first, or takes no jobs.
            KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM; the jobs stay with the cluster.
        """
        self._ledger = Ledger(self._folder)  # not before: another process may have held the study
        left = {job.id: job for job in jobs}
        try:
            self._submit(self._not_with_slurm(jobs))
            self._wait(left, ended)
        except (KeyboardInterrupt, SystemExit):
            self._say_farewell(left)
            raise

    def _not_with_slurm(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs to submit, after cleaning up what a killed study has left."""
        if not self._ledger.jobs:
            self._ledger.write()  # its name comes before the first job that has it
        found = slurm_queue.list_jobs(self._ledger.name)
        alive = {id for id, job in found.items() if job.alive}
        waiting = {id for id, job in found.items() if job.state == "PENDING"}
        slurm_queue.cancel(waiting - set(self._ledger.jobs.values()))
        ours = {job.id: self._ledger.jobs.get(job.id) for job in jobs}
        for run, id in list(self._ledger.jobs.items()):
            if run not in ours and id not in alive:
                self._ledger.drop(run)
        held = [id for id in ours.values() if id in alive and found[id].reason == "JobHeldUser"]
        slurm_queue.release(array_of(id) for id in held)
        if still := sum(id in alive for id in ours.values()):
            _say(f"{still} runs are with Slurm already")
        return [job for job in jobs if ours[job.id] not in alive and not job.done]

    def _submit(self, jobs: Sequence[Job]) -> None:
        """Submit jobs held, record them, and release them."""
        for start in range(0, len(jobs), ARRAY):
            part = jobs[start : start + ARRAY]
            ids = self._submit_array(part)
            self._ledger.add(dict(zip((job.id for job in part), ids, strict=True)))
            slurm_queue.release(map(array_of, ids))
            _say(f"submitted {len(part)} runs to Slurm, as job {array_of(ids[0])}")

    def _submit_array(self, jobs: Sequence[Job]) -> list[str]:
        from submitit.core.utils import FailedJobError

        from muonscale.lab.studies.execute.slurm.task import Task

        workers = min(self._section.workers or len(jobs), len(jobs))
        submitter = make_submitter(
            self._section, self._folder / "slurm", self._ledger.name, workers
        )
        try:
            with _outside_any_job():
                submitted = submitter.map_array(
                    Task(self._section.threads), [job.files for job in jobs]
                )
        except FailedJobError as error:
            raise StudyError(
                f"Slurm takes no jobs of this study: {error}; correct executor.slurm, or set "
                "executor.kind=local"
            ) from error
        return [job.job_id for job in submitted]

    def _wait(self, left: dict[str, Job], ended: Ended) -> None:
        """Wait until all jobs have ended; record why a job left nothing."""
        gone: dict[str, float] = {}  # when the job of a run was found to have ended
        while True:
            for job in [job for job in left.values() if job.done]:
                del left[job.id]
                self._ledger.drop(job.id)
                ended(job.id)
            if not left:
                return
            if (found := self._queue()) is not None:
                for run in left:
                    job = found.get(self._ledger.jobs[run])
                    if job is not None and job.alive:
                        gone.pop(run, None)
                    else:
                        gone.setdefault(run, monotonic())
                lost = [run for run in left if run in gone and monotonic() - gone[run] >= LAG]
                for run in lost:
                    del gone[run]
                self._give_up([left[run] for run in lost], found)
            sleep(POLL)

    def _queue(self) -> Mapping[str, QueuedJob] | None:
        """Return the jobs of the study in the queue, None while Slurm does not answer."""
        try:
            found = slurm_queue.list_jobs(self._ledger.name)
        except NoAnswer as error:
            self._say_once(f"waiting for Slurm to answer: {error}")
            return None
        for job in self._ledger.jobs.values():
            if job in found and found[job].state == "PENDING" and found[job].reason not in USUAL:
                self._say_once(f"job {array_of(job)} waits for: {found[job].reason}")
        return found

    def _give_up(self, jobs: Iterable[Job], found: Mapping[str, QueuedJob]) -> None:
        """Submit preempted jobs again; record how the others ended."""
        again = []
        for job in jobs:
            id = self._ledger.jobs[job.id]
            state = found[id].state if id in found else slurm_queue.accounted_state(id)
            if state == "PREEMPTED":
                again.append(job)
                continue
            how = f"as {state}" if state else "and Slurm no longer knows how"
            record_failure(
                job.failure,
                f"Slurm job {id} ended {how}, without a result{HINTS.get(state or '', '')}; see "
                f"{job.log} and {self._folder / 'slurm' / f'{id}_0_log.err'}",
            )
        self._submit(again)

    def _say_once(self, line: str) -> None:
        if line not in self._printed:
            self._printed.add(line)
            _say(line)

    def _say_farewell(self, left: Iterable[str]) -> None:
        with_slurm = [self._ledger.jobs[run] for run in left if run in self._ledger.jobs]
        if arrays := sorted({array_of(id) for id in with_slurm}, key=int):
            status, run = (command_line("study", verb, self._folder) for verb in ("status", "run"))
            print(
                f"{len(with_slurm)} runs stay with the cluster. Watch them with: {status}\n"
                f"wait for them with: {run}\ncancel them with: scancel {' '.join(arrays)}",
                file=sys.stderr,
                flush=True,
            )


def _say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _outside_any_job() -> Generator[None]:
    """Hide the job that the study itself may run in, whose settings sbatch would inherit."""
    from submitit.helpers import clean_env

    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    kept = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
    with clean_env():
        os.environ.update(kept)
        yield
