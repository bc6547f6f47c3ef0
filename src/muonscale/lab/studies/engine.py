"""Doing a study: plan, run what is missing, plan again with the outcomes, until nothing is new.

A second call continues where the first was stopped: finished runs are found by their id, stopped
ones resume, and the files written at the end depend on the run folders alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonscale.errors import StudyError, command_line
from muonscale.lab.files import drop_nonfinite, write_json
from muonscale.lab.report.page import Page
from muonscale.lab.studies.cost import StudyCost, estimate_cost
from muonscale.lab.studies.execute.executor import make_executor
from muonscale.lab.studies.execute.folder import StudyFolder
from muonscale.lab.studies.kinds import command_of, load_study
from muonscale.lab.studies.planned_run import PlannedRun, index_runs
from muonscale.lab.studies.report_blocks import closing_sections
from muonscale.lab.studies.study import ExpectedRuns, Forecasting, Outcome, Outcomes, Study

if TYPE_CHECKING:
    from muonscale.lab.estimate.run_cost import RunCost

Say = Callable[[str], None]


@dataclass(frozen=True)
class StudyState:
    """A study as it is now."""

    runs: Mapping[str, PlannedRun]
    """The runs known so far, by id."""
    outcomes: Outcomes
    expected: tuple[ExpectedRuns, ...] = ()
    """In a plan: all runs from the first to the last, if the study can count them."""

    @property
    def missing(self) -> list[Outcome]:
        """Runs that have not ended."""
        return [outcome for outcome in self.outcomes.values() if not outcome.ended]

    @property
    def failed(self) -> list[Outcome]:
        """Runs that ended without a result, other than by diverging."""
        return [outcome for outcome in self.outcomes.values() if outcome.state == "failed"]


def look(study: Study) -> StudyState:
    """Return the runs that a study wants, as far as they are known, and their outcomes."""
    folder = StudyFolder(study.config.path)
    outcomes: dict[str, Outcome] = {}
    while True:
        runs = index_runs(study.plan(outcomes))
        if runs.keys() <= outcomes.keys():
            return StudyState(runs, {id: outcomes[id] for id in runs})
        outcomes = folder.outcomes(runs)


def plan_study(study: Study, *, measure: bool = True) -> tuple[StudyState, StudyCost]:
    """Return the runs of a study and their cost, expected ones included; it writes nothing."""
    state = look(study)
    if isinstance(study, Forecasting):
        state = replace(state, expected=tuple(study.expected(state.outcomes)))
    runs = {**{part.example.id: part.example for part in state.expected}, **state.runs}
    return state, estimate_cost(runs, state.outcomes, study.config.executor, measure=measure)


def run_study(study: Study, say: Say, *, retry: bool = False) -> dict[str, Any]:
    """Do the missing runs of a study, write result.json and the report, and return the findings.

    Args:
        study: the study.
        say: called with each line of progress, and at the end with each verdict of the report.
        retry: do failed runs once more.

    Raises:
        StudyError: if another process runs it, or the folder cannot be used.
    """
    folder = StudyFolder(study.config.path)
    executor = make_executor(study.config.executor, folder.path)
    with folder.locked(), _explain_write_errors(folder):
        folder.create(study.config)
        if retry:
            for outcome in look(study).failed:
                folder.job(outcome.run).failure.unlink(missing_ok=True)
        counted: dict[str, RunCost] = {}
        while (state := look(study)).missing:
            _write_plan(study, state, counted)
            _do_missing(study, executor.run, state, say)
        _write_plan(study, state, counted)
        return write_report(study, state, say)


@contextmanager
def _explain_write_errors(folder: StudyFolder) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StudyError(
            f"{error.filename or folder.path}: {error.strerror or error}; remove the cause, and "
            f"continue with: {command_line('study', 'run', folder.path)}"
        ) from error


def _do_missing(study: Study, execute: Callable[..., None], state: StudyState, say: Say) -> None:
    """Do the missing runs, and say how each has ended."""
    folder = StudyFolder(study.config.path)
    waiting = [outcome.run for outcome in state.missing]
    say(f"{len(waiting)} of {len(state.runs)} runs to do, in {folder.path}")
    folder.write_configs(waiting)
    done = len(state.runs) - len(waiting)

    def ended(id: str) -> None:
        nonlocal done
        done += 1
        outcome = folder.outcome(state.runs[id])
        say(f"[{done}/{len(state.runs)}] {outcome.run.label}: {describe_outcome(outcome)}")

    execute([folder.job(run) for run in waiting], ended)
    # Without this check a run that an executor leaves undone for no reason is tried forever.
    if left := [run for run in waiting if not folder.outcome(run).ended]:
        raise StudyError(
            f"{len(left)} runs were stopped before they ended, the first being {left[0].label!r} "
            f"(see {folder.job(left[0]).log}); resume with: "
            f"{command_line('study', 'run', folder.path)}"
        )


def _write_plan(study: Study, state: StudyState, counted: dict[str, RunCost]) -> None:
    executor = study.config.executor
    cost = estimate_cost(state.runs, state.outcomes, executor, measure=False, counted=counted)
    rows = [
        cost.row(outcome.run) | {"folder": outcome.folder.path.name}
        for outcome in state.outcomes.values()
    ]
    write_json(study.config.path / "plan.json", {"runs": rows})


def write_report(study: Study, state: StudyState, say: Say) -> dict[str, Any]:
    """Write result.json and the report of the runs that have ended, and return the findings.

    Args:
        study: the study.
        state: its runs and their outcomes.
        say: called with each verdict of the report.

    Raises:
        StudyError: if the report cannot be written; result.json is whole then.
    """
    from muonscale.lab.report.write import write_page  # matplotlib: not for `study status`

    folder = StudyFolder(study.config.path)
    found = analyze_study(study, state)
    results = folder.path / "result.json"
    write_json(results, found)
    page = build_report(study, found, state.outcomes)
    for verdict in page.verdicts:
        say(f"{verdict.outcome}: {verdict.text}")
    try:
        again = command_line("report", folder.path)
        write_page(page, folder.path / "report", f"remove the cause, and write it with: {again}")
    except StudyError as error:
        raise StudyError(f"the results are in {results}; {error}") from error
    return found


def analyze_study(study: Study, state: StudyState) -> dict[str, Any]:
    """Return the findings of the runs that have ended, as plain values for JSON."""
    failed = [{"run": o.run.label, "reason": o.reason} for o in state.failed]
    return {
        "study": study.config.study,
        "runs": len(state.runs),
        "missing": len(state.missing),
        "stopped": None,
        **drop_nonfinite(study.analyze(state.outcomes)),
        "failed": failed,
    }


def build_report(study: Study, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
    """Return the report of findings, with the sections that all studies have."""
    page = study.report(found, outcomes)
    closing = closing_sections(found, outcomes, command_of(study.config))
    return replace(page, sections=(*page.sections, *closing))


def report_folder(path: Path) -> Page:
    """Return the report of a study folder, of the runs that have ended so far.

    Raises:
        MuonscaleError: if it is no study folder, or is damaged.
    """
    study = load_study(str(path), [f"path={json.dumps(str(path))}"])
    state = look(study)
    return build_report(study, analyze_study(study, state), state.outcomes)


def describe_outcome(outcome: Outcome) -> str:
    """Return the outcome of a run as text."""
    if outcome.result is not None:
        seconds = outcome.train_seconds
        time = "" if seconds is None else f", trained in {seconds:.0f} s"
        return f"validation loss {outcome.loss:.4f}{time}"
    return f"{outcome.state}: {outcome.reason}" if outcome.reason else outcome.state
