"""The plan and the status of a study as text, tables and JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from muonscale.errors import command_line
from muonscale.lab.console import duration_text, si_text, table_text
from muonscale.lab.files import to_json
from muonscale.lab.studies.cost import Account, StudyCost, format_hours
from muonscale.lab.studies.engine import StudyState, describe_outcome
from muonscale.lab.studies.execute.folder import StudyFolder
from muonscale.lab.studies.study import Outcome, Study

COLORS = {
    "finished": "green",
    "running": "cyan",
    "waiting": "dim",
    "diverged": "yellow",
    "failed": "red",
}


def study_plan_text(study: Study, state: StudyState, cost: StudyCost) -> str:
    """Return the runs and their cost as a table, then totals."""
    head = ("run", "parameters", "steps", "tokens", "FLOPs", "time", "state")
    rows = []
    for id, run in state.runs.items():
        one = cost.runs[id]
        rows.append(
            (
                run.label,
                f"{one.parameters:,}",
                f"{one.steps:,}",
                f"{one.tokens:,}",
                si_text(one.flops),
                format_hours(cost.hours([id])),
                state.outcomes[id].state,
            )
        )
    left = [outcome.run.id for outcome in state.missing]
    known = " that are known" if state.expected else ""
    lines = [
        table_text(rows, head),
        "",
        _total(f"all{known}", state.runs, cost),
        _total(f"left to do{known and ' of them'}", left, cost),
    ]
    if state.expected:
        account = Account.of(state.expected, cost)
        account_head, *account_rows = account.rows()
        lines += ["", table_text(account_rows, account_head), "", *account.sentences()]
    lines.append(f"time: {cost.basis}; {_describe_workers(cost, hours_left(state, cost))}")
    if study.config.executor.kind != "slurm":
        begun = (study.config.path / "study.json").exists()
        path = study.config.path if begun else "STUDY"
        lines.append(f"start it with: {command_line('study', 'run', path)}")
    return "\n".join(lines)


def _total(name: str, ids: Any, cost: StudyCost) -> str:
    number, tokens, flops = cost.total(ids)
    hours = format_hours(cost.hours(ids))
    return f"{name}: {number} runs, {tokens:,} tokens, {si_text(flops)} FLOPs, {hours} of runs"


def hours_left(state: StudyState, cost: StudyCost) -> float | None:
    """Return the hours of runs that are left to do, those that cannot be named yet included.

    None if the time of a run is not known.
    """
    left = cost.hours([outcome.run.id for outcome in state.missing])
    if not state.expected or left is None:
        return left
    whole = Account.of(state.expected, cost).total("tuning", "final", "check").seconds
    ended = cost.hours([outcome.run.id for outcome in state.outcomes.values() if outcome.ended])
    if whole is None or ended is None:
        return None
    return max(left, whole / 3600 - ended)  # fewer may have been expected than were done


def _describe_workers(cost: StudyCost, hours: float | None) -> str:
    if cost.workers is None:
        return "the cluster decides how many run at a time"
    if hours is None:
        return f"{cost.workers} at a time"
    return f"{cost.workers} at a time: about {format_hours(hours / cost.workers)} to go"


def plan_json(study: Study, state: StudyState, cost: StudyCost) -> str:
    """Return the plan as JSON."""
    rows = [
        cost.row(run) | {"state": state.outcomes[id].state, "hours": cost.hours([id])}
        for id, run in state.runs.items()
    ]
    totals = {
        name: dict(zip(("runs", "tokens", "flops"), cost.total(ids), strict=True))
        | {"hours": cost.hours(ids)}
        for name, ids in (("all", list(state.runs)), ("left", [o.run.id for o in state.missing]))
    }
    tree = {
        "study": study.config.study,
        "runs": rows,
        "totals": totals,
        "time": cost.basis,
        "hours_left": hours_left(state, cost),
    }
    if state.expected:
        tree["account"] = Account.of(state.expected, cost).tree()
    return to_json(tree)


def status_table(study: Study, state: StudyState) -> Group:
    """Return counts by state and a table of runs with progress; waiting runs share a row.

    The lines above and below are not in the table, since rich would wrap them at its width.
    """
    counts = {name: sum(o.state == name for o in state.outcomes.values()) for name in COLORS}
    summary = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    table = Table(box=None)
    for name in ("run", "state", "step", "loss", "tokens/s", "left"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right")
    for outcome in state.outcomes.values():
        if outcome.state != "waiting":
            table.add_row(outcome.run.label, *_progress(outcome), style=COLORS[outcome.state])
    if counts["waiting"]:
        table.add_row(f"{counts['waiting']} more", "waiting", style=COLORS["waiting"])
    parts: list[RenderableType] = [Text(f"{study.config.path}: {summary}"), table]
    if stopped := _stopped(study, state):
        parts.append(Text(f"stopped: {stopped}"))
    return Group(*parts)


def _stopped(study: Study, state: StudyState) -> str | None:
    """Return why a study whose runs have all ended cannot continue."""
    result = None if state.missing else StudyFolder(study.config.path).result
    return result.get("stopped") if result else None


def _progress(outcome: Outcome) -> tuple[str, ...]:
    """Return state, step, loss, speed and time left."""
    steps = outcome.steps
    if outcome.result is not None:
        rate = outcome.result["tokens_per_second"]
        speed = "" if rate is None else f"{rate:,.0f}"
        return "finished", f"{steps}/{steps}", f"{outcome.loss:.4f}", speed, ""
    if outcome.reason:
        return (f"{outcome.state}: {outcome.reason}",)
    records = outcome.folder.read_metrics("train")
    if not records:
        return (outcome.state, f"0/{steps}")
    last = records[-1]
    loss = "" if last["loss"] is None else f"{last['loss']:.4f}"
    left = (steps - last["step"]) * last["step_ms"] / 1000
    speed = f"{last['tokens_per_second']:,.0f}"
    return outcome.state, f"{last['step']}/{steps}", loss, speed, duration_text(left)


def status_json(study: Study, state: StudyState) -> str:
    """Return the outcome of every run as JSON."""
    rows = [
        {
            "id": id,
            "run": outcome.run.label,
            "state": outcome.state,
            "folder": str(outcome.folder.path),
            "note": describe_outcome(outcome),
        }
        for id, outcome in state.outcomes.items()
    ]
    return to_json({"stopped": _stopped(study, state), "runs": rows})
