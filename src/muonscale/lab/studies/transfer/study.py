"""`study transfer`: whether the best learning rate stays the same when the model gets wider.

For every optimizer and convention of `muonscale.transfer` it measures loss over a hyper-parameter
at several widths, with seeds; finds where each curve is lowest, with an interval; and gives a
verdict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from muonscale.lab.report.page import Page
from muonscale.lab.studies.analysis.sweep import Sweep, build_sweep
from muonscale.lab.studies.planned_run import Coordinate, PlannedRun, PlannedStudy
from muonscale.lab.studies.study import Outcome, Outcomes
from muonscale.lab.studies.transfer.config import TransferConfig
from muonscale.lab.studies.variants import Overrides, resolve_variant
from muonscale.transfer.options import ConventionT


@dataclass(frozen=True)
class TransferStudy(PlannedStudy[TransferConfig]):
    """A study of transfer over widths."""

    @cached_property
    def _fields(self) -> dict[int, Overrides]:
        """Fields of the model by width."""
        from muonscale.lab.models.widen import fields_at
        from muonscale.lab.training.dry_run import planned_shape

        config = self.planner.run({}, seed=0).config
        shape = planned_shape(config)
        return {
            width: {**config.model.fields, **fields_at(shape, width)}
            for width in self.config.widths
        }

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return all runs; at the first width nothing is multiplied, and conventions share them."""
        return [
            run
            for variant, convention in self.config.curves
            for width in self.config.widths
            for value in self.config.values_of.get(variant, self.config.values)
            for run in self._runs(variant, convention, width, value)
        ]

    def _runs(
        self, variant: str, convention: ConventionT, width: int, value: float
    ) -> list[PlannedRun]:
        first = self.config.widths[0]
        where: dict[str, Coordinate] = {"variant": variant}
        keys: dict[str, Any] = {"model.fields": self._fields[width]}
        if width != first:
            where["convention"] = convention
            keys["transfer.convention"] = convention
            keys["transfer.base"] = self._fields[first]
        where |= {"width": width, self.config.name: value}
        own = resolve_variant(self.planner, variant, self.config.variants[variant], keys)
        given = {**own, **keys, self.config.over: value}
        return [
            self.planner.run({**where, "seed": seed}, given, seed=seed)
            for seed in self.config.seeds
        ]

    def analyze(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return where every curve is lowest at every width, and the verdicts."""
        from muonscale.lab.studies.transfer.analysis import analyze_curve

        name = self.config.name
        found = [
            analyze_curve(variant, convention, self._sweeps(outcomes, variant, convention), name)
            for variant, convention in self.config.curves
        ]
        judged = [f.transfers for f in found if f.convention in self.config.judged]
        passed = None if not judged or None in judged else all(judged)
        return {"over": self.config.over, "curves": [asdict(f) for f in found], "passed": passed}

    def _sweeps(
        self, outcomes: Outcomes, variant: str, convention: ConventionT
    ) -> dict[int, Sweep]:
        """Return the sweeps of an optimizer under a convention by width."""
        runs: dict[int, list[Outcome]] = defaultdict(list)
        for outcome in outcomes.values():
            where = outcome.run.coordinates
            if where["variant"] == variant and where.get("convention", convention) == convention:
                runs[int(where["width"])].append(outcome)
        return {width: build_sweep(runs[width], self.config.name) for width in sorted(runs)}

    def report(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        from muonscale.lab.studies.transfer.report import report_transfer

        return report_transfer(self.config, found)
