"""A task of a job array, with a worker that is not a training run."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 60

WORKER = """
import json, os, signal, sys, time
files = json.loads(sys.stdin.readline())
def stop(number, frame):
    time.sleep(0.3)  # a step that has to be finished
    open(files["log"], "a").write("saved\\n")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
open(files["log"], "a").write(f"begun with {os.environ['OMP_NUM_THREADS']} threads\\n")
{act}
"""

# What submitit's `process_job` does with a task, but for asking Slurm.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from muonscale.lab.studies.execute import worker as study_worker
from muonscale.lab.studies.execute.slurm import task as slurm_task
study_worker.WORKER = ("-c", Path({worker!r}).read_text())
slurm_task.state_of = lambda job: {state!r}
os.environ["SLURM_JOB_ID"] = "7"
os.environ["SUBMITIT_EXECUTOR"] = "slurm"
files = {files!r}
task = slurm_task.Task(3)
def preempt(number, frame):
    again = task.checkpoint(files)
    open(files["log"], "a").write(f"requeued {{again.function.__class__.__name__}} {{again.args}}\\n")
    sys.exit(99)
signal.signal(signal.SIGUSR2, preempt)
signal.signal(signal.SIGTERM, lambda number, frame: None)
task(files)
"""


class Started:
    """A task in a process and a process group of its own."""

    def __init__(self, folder: Path, act: str, state: str = "RUNNING") -> None:
        self.files = {name: str(folder / name) for name in ("config", "log", "failure")}
        worker = folder / "worker.py"
        worker.write_text(WORKER.replace("{act}", textwrap.dedent(act)))
        program = PROGRAM.format(worker=str(worker), state=state, files=self.files)
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def log(self) -> list[str]:
        path = Path(self.files["log"])
        return path.read_text().splitlines() if path.exists() else []

    @property
    def failure(self) -> dict[str, Any] | None:
        path = Path(self.files["failure"])
        return json.loads(path.read_text()) if path.exists() else None

    def signal_all(self, number: int) -> None:
        """Send a signal to all processes, as Slurm does, once the worker has begun."""
        end = time.monotonic() + PATIENCE
        while not self.log:
            assert time.monotonic() < end
            time.sleep(0.02)
        os.killpg(self._process.pid, number)

    def end(self) -> int:
        self._said = self._process.communicate(timeout=PATIENCE)[1]
        return self._process.returncode


def test_before_it_is_preempted_a_run_saves_itself(tmp_path: Path) -> None:
    task = Started(tmp_path, "time.sleep(60)")
    task.signal_all(signal.SIGUSR2)
    assert task.end() == 99
    assert task.log == ["begun with 3 threads", "saved", f"requeued Task ({task.files},)"]
    assert task.failure is None


def test_a_run_that_is_asked_to_stop_while_its_job_goes_on_is_requeued(tmp_path: Path) -> None:
    """Slurm sends SIGTERM when the time begins that a preempted job is granted."""
    task = Started(tmp_path, "time.sleep(60)", state="RUNNING")
    task.signal_all(signal.SIGTERM)
    assert task.end() == 99
    assert task.log[1:] == ["saved", f"requeued Task ({task.files},)"]


def test_a_run_whose_job_is_being_ended_is_not_requeued(tmp_path: Path) -> None:
    task = Started(tmp_path, "time.sleep(60)", state="COMPLETING")
    task.signal_all(signal.SIGTERM)
    assert task.end() == 143
    assert task.log[1:] == ["saved"]
    assert task.failure is None  # Slurm's state says more


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("os.kill(os.getpid(), 9)", "signal 9, as when the machine is out of memory"),
        ("os._exit(7)", "exit code 7"),
    ],
)
def test_a_worker_that_dies_is_a_failure(act: str, words: str, tmp_path: Path) -> None:
    task = Started(tmp_path, act)
    assert task.end() == 0
    assert task.failure is not None and not task.failure["diverged"]
    assert words in task.failure["reason"] and task.files["log"] in task.failure["reason"]


def test_a_worker_that_is_done_leaves_no_word(tmp_path: Path) -> None:
    task = Started(tmp_path, "")
    assert task.end() == 0
    assert task.failure is None


def test_a_task_can_be_sent_to_a_node() -> None:
    from muonscale.lab.studies.execute.slurm.task import Task

    assert pickle.loads(pickle.dumps(Task(3)))._threads == 3
