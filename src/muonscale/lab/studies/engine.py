"""Doing a study: plan, run what is missing, plan again with what was found, until nothing is new.

Whatever happens on the way, a second call goes on where the first was stopped: finished runs are
found by their id, stopped ones resume, and what is written at the end depends on the run folders
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from muonscale.errors import StudyError
from muonscale.lab.files import drop_nonfinite, write_json
from muonscale.lab.studies.cost import StudyCost, study_cost
from muonscale.lab.studies.execute.folder import StudyFolder
from muonscale.lab.studies.execute.local import Job, make_executor
from muonscale.lab.studies.study import (
    Expected,
    Forecasting,
    Outcome,
    Outcomes,
    PlannedRun,
    Study,
    unique,
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class State:
    """A study as it is now."""

    runs: Mapping[str, PlannedRun]
    """Those known so far, by id."""
    outcomes: Outcomes
    expected: tuple[Expected, ...] = ()
    """Of a plan: all runs from the first to the last, where the study can count them."""

    @property
    def missing(self) -> list[Outcome]:
        """Those that have not ended."""
        return [outcome for outcome in self.outcomes.values() if not outcome.ended]

    @property
    def failed(self) -> list[Outcome]:
        """Those that ended without a result, other than by diverging."""
        return [outcome for outcome in self.outcomes.values() if outcome.state == "failed"]


def look(study: Study) -> State:
    """Return the runs that a study wants, as far as they are known, and what has become of them."""
    folder = StudyFolder(study.config.path)
    outcomes: dict[str, Outcome] = {}
    while True:
        runs = unique(study.plan(outcomes))
        if runs.keys() <= outcomes.keys():
            return State(runs, {id: outcomes[id] for id in runs})
        outcomes = folder.outcomes(runs)


def plan_study(study: Study, *, measure: bool = True) -> tuple[State, StudyCost]:
    """Return the runs of a study and what they cost, expected ones included; writes nothing."""
    state = look(study)
    if isinstance(study, Forecasting):
        state = replace(state, expected=tuple(study.expected(state.outcomes)))
    runs = {**{part.like.id: part.like for part in state.expected}, **state.runs}
    return state, study_cost(runs, state.outcomes, study.config.executor, measure=measure)


def run_study(study: Study, say: Say, *, retry: bool = False) -> dict[str, Any]:
    """Do what is missing of a study, write result.json and the report, and return what was found.

    Args:
        study: what to do.
        say: where to say what happens, a line at a time.
        retry: do failed runs once more.

    Raises:
        StudyError: if another process runs it, or the folder cannot be used.
    """
    folder = StudyFolder(study.config.path)
    executor = make_executor(study.config.executor, folder.path)
    with folder.locked():
        folder.create(study.config)
        if retry:
            _forget_failures(folder, look(study))
        while (state := look(study)).missing:
            _write_plan(folder, study, state)
            waiting = [outcome.run for outcome in state.missing]
            say(f"{len(waiting)} of {len(state.runs)} runs to do, in {folder.path}")
            folder.write_configs(waiting)
            progress = _Progress(folder, state, say)
            executor.run([_job(folder, run) for run in waiting], progress.ended)
            _check_done(folder, waiting)
        _write_plan(folder, study, state)
        return write_report(study, state)


def write_report(study: Study, state: State) -> dict[str, Any]:
    """Write the report and result.json of what is there, and return what was found."""
    from muonscale.lab.report.write import write_page

    folder = StudyFolder(study.config.path)
    found = find(study, state)
    write_page(study.page(found, state.outcomes), folder.path / "report")
    write_json(folder.path / "result.json", found)
    return found


def find(study: Study, state: State) -> dict[str, Any]:
    """Return what is found in the runs that have ended, as plain values for JSON."""
    failed = [{"run": o.run.label, "reason": o.reason} for o in state.failed]
    return {
        "study": study.config.study,
        "runs": len(state.runs),
        "missing": len(state.missing),
        "stopped": None,
        **drop_nonfinite(study.analyse(state.outcomes)),
        "failed": failed,
    }


def _write_plan(folder: StudyFolder, study: Study, state: State) -> None:
    cost = study_cost(state.runs, state.outcomes, study.config.executor, measure=False)
    rows = [
        cost.row(run) | {"folder": folder.run_folder(run).path.name} for run in state.runs.values()
    ]
    write_json(folder.path / "plan.json", {"runs": rows})


def _job(folder: StudyFolder, run: PlannedRun) -> Job:
    return Job(run.id, folder.config_of(run), folder.log_of(run), folder.failure_of(run))


def _forget_failures(folder: StudyFolder, state: State) -> None:
    for outcome in state.failed:
        folder.failure_of(outcome.run).unlink(missing_ok=True)


def _check_done(folder: StudyFolder, runs: Iterable[PlannedRun]) -> None:
    """Refuse to try for ever what an executor has left undone without a reason."""
    left = [run for run in runs if not folder.outcome(run).ended]
    if left:
        raise StudyError(
            f"{len(left)} runs were stopped before they ended, the first being {left[0].label!r} (see "
            f"{folder.log_of(left[0])}); go on with: muonscale study run {folder.path}"
        )


class _Progress:
    """Says what has become of each run as it ends."""

    def __init__(self, folder: StudyFolder, state: State, say: Say) -> None:
        self._folder, self._runs, self._say = folder, state.runs, say
        self._done, self._all = len(state.runs) - len(state.missing), len(state.runs)

    def ended(self, id: str) -> None:
        self._done += 1
        outcome = self._folder.outcome(self._runs[id])
        self._say(f"[{self._done}/{self._all}] {outcome.run.label}: {described(outcome)}")


def described(outcome: Outcome) -> str:
    """Return what has become of a run, as words."""
    if outcome.result is not None:
        seconds = outcome.result["train_seconds"]
        time = "" if seconds is None else f", trained in {seconds:.0f} s"
        return f"held-out loss {outcome.loss:.4f}{time}"
    return f"{outcome.state}: {outcome.reason}" if outcome.reason else outcome.state
