"""The cost of a study: tokens, FLOPs and hours of its runs, and a summary of all it will run."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from muonscale.lab.console import duration_text, si_text
from muonscale.lab.studies.config import ExecutorSection
from muonscale.lab.studies.planned_run import PlannedRun
from muonscale.lab.studies.study import ExpectedRuns, Outcomes, PartT

if TYPE_CHECKING:
    from muonscale.lab.estimate.run_cost import RunCost

NOT_OF_A_STEP = {"lr", "weight_decay", "overrides"}
"""Keys of the optimizer that do not change the work of a step."""


@dataclass(frozen=True)
class StudyCost:
    """The cost of the runs of a study."""

    runs: Mapping[str, RunCost]
    """By id."""
    seconds: Mapping[str, float]
    """Expected training time by id, of the runs where it is known."""
    basis: str
    """How the seconds are known."""
    workers: int | None
    """Runs at a time; None where the cluster decides."""

    def total(self, ids: Iterable[str]) -> tuple[int, int, int]:
        """Return the number of runs, their tokens and their FLOPs."""
        costs = [self.runs[id] for id in ids]
        return len(costs), sum(c.tokens for c in costs), sum(c.flops for c in costs)

    def row(self, run: PlannedRun) -> dict[str, Any]:
        """Return a run and its cost as plain values."""
        cost = self.runs[run.id]
        where = {"id": run.id, "coordinates": dict(run.coordinates)}
        return where | asdict(cost) | {"flops": cost.flops}

    def hours(self, ids: Iterable[str]) -> float | None:
        """Return the hours that runs take one after the other, None if one is not known."""
        times = [self.seconds.get(id) for id in ids]
        return None if None in times else sum(t for t in times if t is not None) / 3600


def estimate_cost(
    runs: Mapping[str, PlannedRun],
    outcomes: Outcomes,
    executor: ExecutorSection,
    *,
    measure: bool,
    counted: dict[str, RunCost] | None = None,
) -> StudyCost:
    """Return the cost of runs.

    Args:
        runs: runs by id.
        outcomes: their outcomes; finished runs say how long a step takes.
        executor: where they are done.
        measure: time a few steps where no finished run says how long one takes.
        counted: costs that were counted before, by what a step does; new ones are added.
    """
    from muonscale.lab.estimate.run_cost import run_cost

    counted = {} if counted is None else counted
    groups: dict[str, list[PlannedRun]] = defaultdict(list)
    for run in runs.values():
        config = run.config
        work = json.dumps(
            [
                config.model.model_dump(mode="json"),
                config.data.model_dump(
                    mode="json", include={"vocab_size", "tokenizer", "sequence_length"}
                ),
                config.optimizer.model_dump(mode="json", exclude=NOT_OF_A_STEP),
                config.train.model_dump(mode="json", exclude={"tokens", "steps"}),
            ],
            sort_keys=True,
        )
        groups[work].append(run)
    costs: dict[str, RunCost] = {}
    seconds: dict[str, float] = {}
    bases = set()
    for work, group in groups.items():
        if work not in counted:
            counted[work] = run_cost(group[0].config)
        found = counted[work]
        step_seconds, basis = _step_seconds(group, found, outcomes, executor, measure=measure)
        bases.add(basis)
        for run in group:
            steps = run.config.steps
            tokens = run.config.timeline.tokens_before(steps)
            cost = costs[run.id] = replace(found, steps=steps, tokens=tokens)
            if executor.flops_per_second is not None:
                seconds[run.id] = cost.flops / executor.flops_per_second
            elif step_seconds is not None:
                seconds[run.id] = steps * step_seconds
    ordered = {id: costs[id] for id in runs}
    return StudyCost(ordered, seconds, "; ".join(sorted(bases)), executor.concurrent_runs)


def _step_seconds(
    group: list[PlannedRun],
    cost: RunCost,
    outcomes: Outcomes,
    executor: ExecutorSection,
    *,
    measure: bool,
) -> tuple[float | None, str]:
    """Return the seconds of a step, which all runs of the group share, None if unknown.

    The second value says how they are known.
    """
    from muonscale.lab.estimate.run_cost import measure_step

    if (speed := executor.flops_per_second) is not None:
        return None, f"{si_text(speed)} FLOP/s, as executor.flops_per_second says"
    done = [outcomes[run.id] for run in group if run.id in outcomes]
    known = [o.train_seconds / o.run.config.steps for o in done if o.train_seconds is not None]
    if known:
        return statistics.median(known), "finished runs"
    if measure and executor.kind != "slurm":
        step = measure_step(group[0].config, cost, threads=executor.threads)
        if step is not None:
            return step, "a few steps timed here, one run alone"
    return None, "unknown; give executor.flops_per_second"


@dataclass(frozen=True)
class AccountLine:
    """Runs that cost the same."""

    name: str
    part: PartT
    runs: int
    most: int
    """The largest number they may become."""
    flops: int
    """FLOPs of one run, Newton-Schulz included."""
    seconds: float | None
    """Seconds of one run, if known."""


@dataclass(frozen=True)
class AccountTotal:
    """The sum of several lines."""

    runs: int
    flops: int
    seconds: float | None
    """None if the seconds of one line are not known."""

    @property
    def hours(self) -> str:
        """The hours as text."""
        return format_hours(None if self.seconds is None else self.seconds / 3600)


Shares = tuple[float, float | None]
"""A share of FLOPs and of seconds."""

PARTS: dict[PartT, str] = {
    "tuning": "tuning",
    "final": "final runs",
    "check": "checking",
    "instead": "not done",
}


@dataclass(frozen=True)
class Account:
    """The cost of a study from its first run to its last, and of what it replaces."""

    lines: tuple[AccountLine, ...]

    @classmethod
    def of(cls, expected: Iterable[ExpectedRuns], cost: StudyCost) -> Account:
        """Return the account of expected runs; `cost` has to hold their examples."""
        return cls(
            tuple(
                AccountLine(
                    e.name,
                    e.part,
                    e.runs,
                    e.most,
                    cost.runs[e.example.id].flops,
                    cost.seconds.get(e.example.id),
                )
                for e in expected
            )
        )

    def total(self, *parts: PartT, most: bool = False) -> AccountTotal:
        """Return the sum of some parts, or the most that it may become."""
        counted = [
            (line.most if most else line.runs, line) for line in self.lines if line.part in parts
        ]
        known = all(line.seconds is not None for _, line in counted)
        return AccountTotal(
            sum(number for number, _ in counted),
            sum(number * line.flops for number, line in counted),
            sum(number * (line.seconds or 0.0) for number, line in counted) if known else None,
        )

    @property
    def tuning_share(self) -> Shares:
        """Tuning over tuning and final runs together."""
        return self._share(self.total("tuning"), self.total("tuning", "final"))

    @property
    def of_instead(self) -> Shares | None:
        """Tuning and final runs over the runs that they replace."""
        if not any(line.part == "instead" for line in self.lines):
            return None
        return self._share(self.total("tuning", "final"), self.total("instead"))

    def _share(self, part: AccountTotal, whole: AccountTotal) -> Shares:
        seconds = None
        if part.seconds is not None and whole.seconds:
            seconds = part.seconds / whole.seconds
        return part.flops / whole.flops, seconds

    def tree(self) -> dict[str, Any]:
        """Return the account as plain values for JSON."""

        def named(shares: Shares | None) -> dict[str, float | None] | None:
            return None if shares is None else {"flops": shares[0], "seconds": shares[1]}

        return {
            "lines": [asdict(line) for line in self.lines],
            "sums": {part: asdict(self.total(part)) for part in PARTS},
            "most": asdict(self.total("tuning", "final", most=True)),
            "tuning_share": named(self.tuning_share),
            "of_instead": named(self.of_instead),
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Return the account as rows of a table, the head first."""
        head = ("account", "runs", "at most", "FLOPs of one", "FLOPs", "time", "for")
        return [
            head,
            *(
                (
                    line.name,
                    str(line.runs),
                    str(line.most),
                    si_text(line.flops),
                    si_text(line.runs * line.flops),
                    format_hours(None if line.seconds is None else line.runs * line.seconds / 3600),
                    PARTS[line.part],
                )
                for line in self.lines
            ),
        ]

    def sentences(self) -> list[str]:
        """Return the totals of the account as sentences."""

        def format_shares(shares: Shares) -> str:
            seconds = "" if shares[1] is None else f", {shares[1]:.1%} of seconds"
            return f"{shares[0]:.1%} of FLOPs{seconds}"

        whole, most = self.total("tuning", "final"), self.total("tuning", "final", most=True)
        found = [
            f"tuning and final runs: {si_text(whole.flops)} FLOPs, {whole.hours} of runs; at most "
            f"{si_text(most.flops)} FLOPs, {most.hours}",
            f"share of tuning: {format_shares(self.tuning_share)}",
        ]
        if self.of_instead is not None:
            names = " and ".join(line.name for line in self.lines if line.part == "instead")
            found.append(f"share of what it replaces ({names}): {format_shares(self.of_instead)}")
        return found


def format_hours(hours: float | None) -> str:
    """Return hours as people say them; a question mark where they are not known."""
    return "?" if hours is None else duration_text(3600 * hours)
