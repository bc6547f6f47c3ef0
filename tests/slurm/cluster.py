"""What the tests do with Slurm and with studies on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muonscale.lab.studies.engine import look
from muonscale.lab.studies.kinds import load_study
from muonscale.lab.studies.study import Study

PATIENCE = 600
"""Seconds that anything may take: the machine may be busy."""


CPUS = 2
"""Of the node, see start.sh."""


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.1)


class Cluster:
    """Slurm's commands."""

    def say(self, *words: object) -> str:
        """Give a command and return its answer."""
        given = [str(word) for word in words]
        return subprocess.run(given, capture_output=True, text=True, check=True).stdout.strip()

    def state(self, job: str) -> str:
        """Return the state of a job."""
        return self.say("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")

    def preempt_all(self) -> None:
        """Have a more urgent job take the node."""
        words = ["--partition=urgent", f"--cpus-per-task={CPUS}", "--output=/dev/null"]
        self.say("sbatch", "--wait", *words, "--wrap=true")

    def suspend(self, *jobs: str) -> None:
        """Stop jobs where they are, so that a test has time."""
        for job in jobs:
            self.say("scontrol", "suspend", job)

    def resume(self, *jobs: str) -> None:
        """Have suspended jobs go on."""
        for job in jobs:
            self.say("scontrol", "resume", job)

    def clear(self) -> None:
        """Leave no job."""
        self.say("scancel", f"--user={os.getuid()}")
        wait_for(lambda: not self.say("squeue", "--noheader"), "all jobs are gone")

    def begin_now(self, job: str) -> None:
        """Have a requeued job begin, once its old self is gone; Slurm would have it wait for minutes."""
        wait_for(lambda: self.state(job) == "PENDING", f"{job} is in the queue again")
        self.say("scontrol", "update", f"JobId={job}", "StartTime=now")


class StudyRun:
    """A study and the processes that do it.

    Args:
        recipe: of the study.
        folder: made, for its recipe and its folder.
    """

    def __init__(self, recipe: dict[str, Any], folder: Path) -> None:
        folder.mkdir()
        self.folder = folder / "study"
        self._recipe = folder / "recipe.json"
        self._recipe.write_text(json.dumps(recipe | {"path": str(self.folder)}))
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start `study run`."""
        process = subprocess.Popen(
            [sys.executable, "-m", "muonscale", "study", "run", str(self._recipe), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        return process

    def run(self, *words: str) -> tuple[int, str]:
        """Return exit code and output of `study run`."""
        process = self.start(*words)
        output = process.communicate(timeout=PATIENCE)[0]
        return process.returncode, output

    def stop(self) -> None:
        """Leave no process."""
        for process in self._processes:
            process.kill()
            process.wait()

    def status(self) -> dict[str, str]:
        """Return the states of the runs, by id, as `study status` has them."""
        return {id: outcome.state for id, outcome in look(self.study).outcomes.items()}

    @property
    def study(self) -> Study:
        """The study itself."""
        return load_study(str(self._recipe))

    @property
    def jobs(self) -> dict[str, str]:
        """Slurm's job by run id, of those that are with it."""
        path = self.folder / "slurm.json"
        return json.loads(path.read_text())["jobs"] if path.exists() else {}

    def submitted(self) -> dict[str, str]:
        """Wait until the study has submitted its runs, and return their jobs."""

        def submitted_or_ended() -> bool:
            for process in self._processes:
                assert process.poll() is None, process.communicate()[0]
            return bool(self.jobs)

        wait_for(submitted_or_ended, "the study has submitted its runs")
        return self.jobs

    @property
    def submissions(self) -> int:
        """How many job arrays were submitted."""
        return len(list((self.folder / "slurm").glob("*_submission.sh")))

    @property
    def result(self) -> dict[str, Any]:
        """What was found."""
        return json.loads((self.folder / "result.json").read_text())

    def run_folder(self, id: str) -> Path:
        """Return the folder of a run."""
        (path,) = (self.folder / "runs").glob(f"*-{id}")
        return path

    def log(self, id: str) -> str:
        """Return what a run said."""
        return (self.folder / "logs" / f"{self.run_folder(id).name}.log").read_text()

    def steps(self, id: str) -> int:
        """Return how many lines a run's metrics have."""
        found = list((self.folder / "runs").glob(f"*-{id}/metrics.jsonl"))
        return len(found[0].read_text().splitlines()) if found else 0

    def weights(self) -> dict[str, bytes]:
        """Return the trained models, by run id."""
        found = (self.folder / "runs").glob("*/model/model.safetensors")
        return {path.parts[-3].rpartition("-")[2]: path.read_bytes() for path in found}

    def losses(self) -> dict[str, list[float]]:
        """Return the training losses of the runs, step by step, by run id."""
        found: dict[str, list[float]] = {}
        for path in (self.folder / "runs").glob("*/metrics.jsonl"):
            records = [json.loads(line) for line in path.read_text().splitlines()]
            id = path.parts[-2].rpartition("-")[2]
            found[id] = [record["loss"] for record in records if record["kind"] == "train"]
        return found
