"""`study compare`: optimizers against each other, with equal tokens and equal tuning effort.

Every variant has the same number of learning rates and the same seeds at every place (a combination
of values of the axes). The best learning rate of a variant has the lowest mean loss. With
`confirm_seeds` it is run again with seeds that chose nothing, and only these runs are compared.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from muonscale.lab.report.page import Page
from muonscale.lab.studies.analysis.sweep import build_sweep
from muonscale.lab.studies.compare.config import CompareConfig
from muonscale.lab.studies.planned_run import Coordinate, PlannedRun, PlannedStudy
from muonscale.lab.studies.study import Outcome, Outcomes
from muonscale.lab.studies.variants import AXES, Overrides, resolve_variant

RUN_COORDINATES = ("variant", "lr", "seed")
"""Coordinates of a run at a place; the others are the place."""


@dataclass(frozen=True)
class CompareStudy(PlannedStudy[CompareConfig]):
    """A comparison of optimizers."""

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return the tuning runs, and the confirming ones of places whose tuning has ended."""
        runs = []
        for place, keys in self._places:
            for variant in self.config.variants:
                tuning = [
                    self._run(place, keys, variant, lr, seed)
                    for lr in self.config.rates(variant)
                    for seed in self.config.seeds
                ]
                runs += tuning
                known = [outcomes[run.id] for run in tuning if run.id in outcomes]
                if len(known) < len(tuning) or not all(o.ended for o in known):
                    continue
                sweep = build_sweep(known, "lr")
                if sweep.best is not None:
                    lr = sweep.points[sweep.best].value
                    runs += [
                        self._run(place, keys, variant, lr, seed)
                        for seed in self.config.confirm_seeds
                    ]
        return runs

    @cached_property
    def _places(self) -> list[tuple[dict[str, Coordinate], Overrides]]:
        """The combinations of values of the axes, and their overrides."""
        from muonscale.lab.estimate.run_cost import run_cost

        axes, found = self.config.axes, []
        for values in itertools.product(*axes.values()):
            place: dict[str, Coordinate] = dict(zip(axes, values, strict=True))
            keys: dict[str, Any] = {}
            for axis, value in zip(axes, values, strict=True):
                keys |= {**AXES.get(axis, {}).get(value, {}), **axes[axis][value]}
            if not self.config.tokens_per_parameter:
                found.append((place, keys))
                continue
            parameters = run_cost(self.planner.run({}, keys, seed=0).config).parameters
            for ratio in self.config.tokens_per_parameter:
                length = {"train.tokens": math.ceil(ratio * parameters)}
                found.append(({**place, "tokens_per_parameter": ratio}, {**keys, **length}))
        return found

    def _run(
        self,
        place: Mapping[str, Coordinate],
        overrides: Overrides,
        variant: str,
        lr: float,
        seed: int,
    ) -> PlannedRun:
        coordinates = {**place, "variant": variant, "lr": lr, "seed": seed}
        keys = resolve_variant(self.planner, variant, self.config.variants[variant], overrides)
        return self.planner.run(coordinates, overrides, keys, {"optimizer.lr": lr}, seed=seed)

    def analyze(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return the comparison at every place."""
        from muonscale.lab.studies.compare.analysis import ComparedRuns, analyze_place

        places: dict[tuple[tuple[str, Coordinate], ...], list[Outcome]] = defaultdict(list)
        for outcome in outcomes.values():
            where = outcome.run.coordinates.items()
            places[tuple(item for item in where if item[0] not in RUN_COORDINATES)].append(outcome)
        tuning, analyses = set(self.config.seeds), []
        for place, each in places.items():
            runs = {}
            for variant in self.config.variants:
                own = [o for o in each if o.run.coordinates["variant"] == variant]
                seeded = [o for o in own if o.run.coordinates["seed"] in tuning]
                confirming = [o for o in own if o.run.coordinates["seed"] not in tuning]
                runs[variant] = ComparedRuns.of(seeded, confirming)
            analyses.append(asdict(analyze_place(dict(place), self.config.baselines, runs)))
        return {"baselines": self.config.baselines, "places": analyses}

    def report(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        from muonscale.lab.studies.compare.report import report_comparison

        return report_comparison(self.config, found, outcomes)
