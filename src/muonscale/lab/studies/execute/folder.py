"""The folder of a study, which `run`, `status` and the report share.

study.json      the resolved configuration of the study
plan.json       the runs known so far: id, coordinates, folder, tokens, FLOPs; facts about models
configs/        NAME.json: the resolved configuration of every run
runs/           NAME/: the run folders; NAME ends with the run's id
logs/           NAME.log: output of a run; NAME.failed.json: why it ended without a result
slurm.json      the runs that Slurm has; slurm/: files of submitit and Slurm
result.json     the findings, written before the report
report/         the page, with its figures
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from muonscale.errors import StudyError, command_line
from muonscale.lab.config.load import dump_config
from muonscale.lab.files import lock_folder, write_atomic, write_json
from muonscale.lab.run_folder import RunFolder, flatten
from muonscale.lab.studies.config import StudyConfig
from muonscale.lab.studies.execute.job import Job, read_study_file
from muonscale.lab.studies.execute.slurm.ledger import find_begun_runs
from muonscale.lab.studies.planned_run import NOT_IDENTITY, PlannedRun
from muonscale.lab.studies.study import Outcome

LOCK = "study.lock"


@dataclass(frozen=True)
class StudyFolder:
    """Paths and files of one study.

    It lists `runs/` once: after runs were done, make another one to find folders of other labels.
    """

    path: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """The findings; None before they are written."""
        return read_study_file(self.path / "result.json")

    @cached_property
    def _made(self) -> dict[str, Path]:
        """The run folders by the id at the end of their names, as they were at first."""
        return {path.name.rpartition("-")[2]: path for path in (self.path / "runs").glob("*-*")}

    def run_folder(self, run: PlannedRun) -> RunFolder:
        """Return the folder that ends with the run's id, whatever label it was made with."""
        return RunFolder(self._made.get(run.id, self.path / "runs" / run.folder))

    def job(self, run: PlannedRun) -> Job:
        """Return a run as a job, with the paths of its configuration, log and failure."""
        folder, logs = self.run_folder(run), self.path / "logs"
        name = folder.path.name
        config = self.path / "configs" / f"{name}.json"
        return Job(run.id, folder, config, logs / f"{name}.log", logs / f"{name}.failed.json")

    def outcome(self, run: PlannedRun) -> Outcome:
        """Return the outcome of a run.

        Raises:
            StudyError: if it was done with other defaults than those of today.
        """
        folder = self.run_folder(run)
        if (result := folder.result()) is not None:
            now = flatten(run.config.model_dump(mode="json", exclude=NOT_IDENTITY))
            then = flatten(folder.saved_config())
            for key in now.keys() & then.keys():
                if now[key] != then[key]:
                    raise StudyError(
                        f"{folder.path} was done with {key}={then[key]!r}, which is {now[key]!r} "
                        "now: another version of muonscale had another default. Give the key in "
                        "`set`, or move the folder away to do the run again"
                    )
            return Outcome(run, folder, "finished", result)
        if folder.is_locked():
            return Outcome(run, folder, "running")
        if (failure := read_study_file(self.job(run).failure)) is not None:
            state = "diverged" if failure["diverged"] else "failed"
            return Outcome(run, folder, state, reason=failure["reason"])
        return Outcome(run, folder, "waiting")

    def outcomes(self, runs: Mapping[str, PlannedRun]) -> dict[str, Outcome]:
        """Return the outcome of every run by id; Slurm is asked about the runs that it has."""
        found = {id: self.outcome(run) for id, run in runs.items()}
        waiting = [id for id, outcome in found.items() if outcome.state == "waiting"]
        for id, note in find_begun_runs(self.path, waiting).items():
            found[id] = replace(found[id], state="running", reason=note)
        return found

    def create(self, config: StudyConfig) -> None:
        """Make the folder if needed and write study.json.

        Raises:
            StudyError: if it cannot be written, or holds other files.
        """
        strange = self.path.exists() and not (self.path / "study.json").exists()
        if strange and any(p.name != LOCK for p in self.path.iterdir()):
            raise StudyError(
                f"{self.path} holds other files and no study; choose another with path=FOLDER"
            )
        try:
            for name in ("configs", "runs", "logs"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            write_json(self.path / "study.json", config.model_dump(mode="json"))
        except OSError as error:
            raise StudyError(
                f"study folder {self.path} cannot be written: {error}; choose another with "
                "path=FOLDER"
            ) from error

    def write_configs(self, runs: Iterable[PlannedRun]) -> None:
        """Write the configurations of runs, with their folders, as `muonscale train` takes them."""
        for run in runs:
            section = run.config.run.model_copy(update={"path": self.run_folder(run).path})
            config = run.config.model_copy(update={"run": section})
            write_atomic(self.job(run).config, dump_config(config))

    def locked(self) -> AbstractContextManager[None]:
        """Lock the study, so that no second process runs it; create the folder if necessary.

        Raises:
            StudyError: if another process holds the lock, or the file system has no locks.
        """
        status = command_line("study", "status", self.path)
        return lock_folder(
            self.path,
            LOCK,
            busy=f"running the study in {self.path}; watch it with: {status}",
            choose="path=FOLDER",
            error=StudyError,
        )
