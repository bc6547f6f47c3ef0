"""What a study costs before anything of it is run: tokens, operations, hours."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from muonscale.lab.studies.config import ExecutorSection
from muonscale.lab.studies.execute.local import default_workers
from muonscale.lab.studies.study import Outcomes, PlannedRun

if TYPE_CHECKING:
    from muonscale.lab.estimate.run_cost import RunCost

NOT_OF_A_STEP = {"lr", "weight_decay", "overrides"}
"""Keys of the optimizer that leave the work of a step as it is."""


@dataclass(frozen=True)
class StudyCost:
    """What the runs of a study cost."""

    runs: Mapping[str, RunCost]
    """By id."""
    seconds: Mapping[str, float]
    """Expected training time of those for which it is known."""
    basis: str
    """Where the seconds come from."""
    workers: int | None
    """Runs at a time; None where the cluster decides."""

    def total(self, ids: Iterable[str]) -> tuple[int, int, int]:
        """Return the number of runs, their tokens and their operations."""
        costs = [self.runs[id] for id in ids]
        return len(costs), sum(c.tokens for c in costs), sum(c.flops for c in costs)

    def row(self, run: PlannedRun) -> dict[str, Any]:
        """Return what a run is and costs, as plain values."""
        cost = self.runs[run.id]
        where = {"id": run.id, "coordinates": dict(run.coordinates)}
        return where | asdict(cost) | {"flops": cost.flops}

    def hours(self, ids: Iterable[str]) -> float | None:
        """Return the hours that runs take one after the other, None where one is not known."""
        times = [self.seconds.get(id) for id in ids]
        if None in times:
            return None
        return sum(t for t in times if t is not None) / 3600


def study_cost(
    runs: Mapping[str, PlannedRun], outcomes: Outcomes, executor: ExecutorSection, *, measure: bool
) -> StudyCost:
    """Return what runs cost.

    Args:
        runs: by id.
        outcomes: of them; finished ones tell how long a step takes.
        executor: where they are done.
        measure: take a few steps where no finished run tells, rather than not say the time.
    """
    kinds: dict[str, list[PlannedRun]] = defaultdict(list)
    for run in runs.values():
        kinds[_kind(run)].append(run)
    costs: dict[str, RunCost] = {}
    seconds: dict[str, float] = {}
    bases = set()
    for alike in kinds.values():
        found, one_step, basis = _kind_cost(alike, outcomes, executor, measure=measure)
        bases.add(basis)
        for run in alike:
            steps = run.config.steps
            tokens = run.config.timeline.tokens_before(steps)
            cost = costs[run.id] = replace(found, steps=steps, tokens=tokens)
            if executor.flops_per_second is not None:
                seconds[run.id] = cost.flops / executor.flops_per_second
            elif one_step is not None:
                seconds[run.id] = steps * one_step
    workers = executor.workers
    if workers is None and executor.kind != "slurm":
        workers = 1 if executor.kind == "inline" else default_workers(executor.threads)
    ordered = {id: costs[id] for id in runs}
    return StudyCost(ordered, seconds, "; ".join(sorted(bases)), workers)


def _kind(run: PlannedRun) -> str:
    """Return what decides the work of a step."""
    config = run.config
    parts = [
        config.model.model_dump(mode="json"),
        config.data.model_dump(mode="json", include={"vocab_size", "tokenizer", "sequence_length"}),
        config.optimizer.model_dump(mode="json", exclude=NOT_OF_A_STEP),
        config.train.model_dump(mode="json", exclude={"tokens", "steps"}),
    ]
    return json.dumps(parts, sort_keys=True)


def _kind_cost(
    alike: list[PlannedRun], outcomes: Outcomes, executor: ExecutorSection, *, measure: bool
) -> tuple[RunCost, float | None, str]:
    """Return the cost of a run, the seconds of its steps if known, and where they come from."""
    from muonscale.lab.estimate.run_cost import measure_step, run_cost

    config = alike[0].config
    cost = run_cost(config)
    if executor.flops_per_second is not None:
        return (
            cost,
            None,
            f"{executor.flops_per_second:.3g} FLOP/s, as executor.flops_per_second says",
        )
    done = [outcomes[run.id] for run in alike if run.id in outcomes]
    timed = [o for o in done if o.result is not None and o.result["train_seconds"] is not None]
    known = [o.result["train_seconds"] / o.run.config.steps for o in timed if o.result]
    if known:
        return cost, statistics.median(known), "finished runs"
    if measure and executor.kind != "slurm":
        one_step = measure_step(config, cost, threads=executor.threads)
        if one_step is not None:
            return cost, one_step, "a few steps timed here, one run alone"
    return cost, None, "not known: give executor.flops_per_second"
