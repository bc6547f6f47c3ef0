"""The folder of a study: the only thing that `run`, `status` and the report share.

study.json      the resolved configuration of the study
plan.json       the runs that are known so far: id, coordinates, folder, tokens, operations
configs/        NAME.json: the resolved configuration of every run
runs/           NAME/: the run folders, NAME ending with the run's id
logs/           NAME.log: what a run said; NAME.failed.json: why it ended without a result
slurm.json      which runs are with Slurm; slurm/: what submitit and Slurm keep of them
result.json     what was found, written last
report/         the page, with its figures
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from muonscale.errors import StudyError
from muonscale.lab.config.load import Config, dump_config
from muonscale.lab.files import lock_folder, read_object, write_atomic, write_json
from muonscale.lab.run_folder import RunFolder, flatten
from muonscale.lab.studies.config import StudyConfig
from muonscale.lab.studies.study import NOT_IDENTITY, Outcome, PlannedRun, StateT

LOCK = "study.lock"


@dataclass(frozen=True)
class StudyFolder:
    """Paths and files of one study."""

    path: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """What was found; None of a study that has not come so far."""
        return read_study_file(self.path / "result.json")

    def run_folder(self, run: PlannedRun) -> RunFolder:
        """Return the folder of a run: the one that has its id, whatever it was called."""
        runs = self.path / "runs"
        found = next(iter(runs.glob(f"*-{run.id}")), None) if runs.is_dir() else None
        return RunFolder(found or runs / run.folder)

    def config_of(self, run: PlannedRun) -> Path:
        """Return the file of a run's configuration."""
        return self.path / "configs" / f"{self.run_folder(run).path.name}.json"

    def log_of(self, run: PlannedRun) -> Path:
        """Return the file of what a run says."""
        return self.path / "logs" / f"{self.run_folder(run).path.name}.log"

    def failure_of(self, run: PlannedRun) -> Path:
        """Return the file that says why a run failed."""
        return self.log_of(run).with_suffix(".failed.json")

    def outcome(self, run: PlannedRun) -> Outcome:
        """Return what has become of a run."""
        folder = self.run_folder(run)
        if (result := folder.result()) is not None:
            self._check_same(run, folder)
            return Outcome(run, folder, "finished", result)
        if folder.is_locked():
            return Outcome(run, folder, "running")
        if (failure := read_study_file(self.failure_of(run))) is not None:
            state: StateT = "diverged" if failure["diverged"] else "failed"
            return Outcome(run, folder, state, reason=failure["reason"])
        return Outcome(run, folder, "waiting")

    def _check_same(self, run: PlannedRun, folder: RunFolder) -> None:
        """Refuse a run that was done under other defaults than there are now."""
        now = flatten(run.config.model_dump(mode="json", exclude=NOT_IDENTITY))
        then = flatten(folder.saved_config())
        for key in now.keys() & then.keys():
            if now[key] != then[key]:
                raise StudyError(
                    f"{folder.path} was done with {key}={then[key]!r}, which is {now[key]!r} now: "
                    "another version of muonscale had another default. Give the key in `set`, or move "
                    "the folder away to do the run again"
                )

    def outcomes(self, runs: Mapping[str, PlannedRun]) -> dict[str, Outcome]:
        """Return what has become of every run, by id; Slurm is asked about those that are with it."""
        from muonscale.lab.studies.execute.slurm.ledger import runs_begun

        found = {id: self.outcome(run) for id, run in runs.items()}
        waiting = [id for id, outcome in found.items() if outcome.state == "waiting"]
        for id, said in runs_begun(self.path, waiting).items():
            found[id] = replace(found[id], state="running", reason=said)
        return found

    def create(self, config: StudyConfig) -> None:
        """Make the folder, if need be, and write study.json.

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
                f"study folder {self.path} cannot be written: {error}"
                "; choose another with path=FOLDER"
            ) from error

    def write_configs(self, runs: Iterable[PlannedRun]) -> None:
        """Write the configurations of runs, as `muonscale train` takes them."""
        for run in runs:
            write_atomic(self.config_of(run), dump_config(self.placed(run)))

    def placed(self, run: PlannedRun) -> Config:
        """Return the configuration of a run with its folder in it."""
        section = run.config.run.model_copy(update={"path": self.run_folder(run).path})
        return run.config.model_copy(update={"run": section})

    def locked(self) -> AbstractContextManager[None]:
        """Lock the study, so that no second process runs it; create the folder if necessary.

        Raises:
            StudyError: if another process holds the lock, or the file system has no locks.
        """
        status = f"muonscale study status {self.path}"
        return lock_folder(
            self.path,
            LOCK,
            busy=f"running the study in {self.path}; watch it with: {status}",
            choose="path=FOLDER",
            error=StudyError,
        )


def read_study_file(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file of a study, None if there is no file.

    Raises:
        StudyError: if the file is damaged.
    """
    return read_object(path, "restore it, or remove it to repeat its runs", StudyError)
