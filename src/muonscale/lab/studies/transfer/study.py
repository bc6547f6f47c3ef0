"""`study transfer`: does the best learning rate stay where it is when the model gets wider?

For every optimizer and convention of `muonscale.transfer`: curves of loss over a hyper-parameter at
several widths, with seeds; where each is lowest, with an interval; and a verdict.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from muonscale.lab.report.page import Page
from muonscale.lab.studies.analysis.sweep import Point, Sweep
from muonscale.lab.studies.config import StudyConfig, check_variants, named_overrides
from muonscale.lab.studies.study import Coordinate, Outcomes, PlannedRun, Planner
from muonscale.lab.studies.transfer.analysis import Curve, found_of
from muonscale.lab.studies.variants import VARIANTS, Overrides, variant_keys

ConventionT = Literal["spectral", "adam_table", "standard"]
Positive = Annotated[float, Field(gt=0)]


class TransferConfig(StudyConfig):
    """Keys of a transfer study."""

    study: Literal["transfer"] = "transfer"
    widths: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=2)]
    """Widths of the model in rising order; what is multiplied is relative to the first."""
    over: Literal["optimizer.lr", "optimizer.weight_decay"] = "optimizer.lr"
    """The hyper-parameter, a key of the recipe."""
    values: Annotated[list[Positive], Field(min_length=3)]
    """Its values, in rising order, each about as many times the one before."""
    values_of: dict[str, list[Positive]] = {}
    """Other values for an optimizer."""
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = {"muon": {}}
    """Optimizers, as for `compare`."""
    conventions: Annotated[list[ConventionT], Field(min_length=1)] = ["spectral", "standard"]
    """How hyper-parameters change with the width."""
    conventions_of: dict[str, list[ConventionT]] = {}
    """Other conventions for an optimizer."""
    judged: list[ConventionT] = ["spectral"]
    """Conventions whose verdicts make the exit code, where they are studied."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0, 1]

    @field_validator("variants", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return named_overrides(value, "variants", VARIANTS)

    @model_validator(mode="after")
    def _in_order(self) -> TransferConfig:
        if sorted(set(self.widths)) != self.widths:
            raise ValueError(f"widths={self.widths} must rise from one to the next")
        for name, values in [("values", self.values), *self.values_of.items()]:
            if sorted(set(values)) != values or len(values) < 3:
                raise ValueError(f"{name}={values}: three or more are needed, rising")
        for key in ("values_of", "conventions_of"):
            check_variants(key, getattr(self, key), self.variants)
        return self

    @property
    def name(self) -> str:
        """What the hyper-parameter is called."""
        return {"optimizer.lr": "lr", "optimizer.weight_decay": "wd"}[self.over]

    @property
    def curves(self) -> list[tuple[str, ConventionT]]:
        """Optimizers and conventions."""
        return [
            (variant, convention)
            for variant in self.variants
            for convention in self.conventions_of.get(variant, self.conventions)
        ]


@dataclass(frozen=True)
class Transfer:
    """The study."""

    config: TransferConfig

    @cached_property
    def _planner(self) -> Planner:
        return Planner(self.config)

    @cached_property
    def _fields(self) -> dict[int, Overrides]:
        """Fields of the model by width, as overrides."""
        from muonscale.lab.models.widen import fields_at
        from muonscale.lab.training.dry_run import planned_shape

        config = self._planner.run({}, seed=0).config
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
            for value in self._values(variant)
            for run in self._runs(variant, convention, width, value)
        ]

    def _values(self, variant: str) -> list[float]:
        return self.config.values_of.get(variant, self.config.values)

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
        own = variant_keys(self._planner, variant, self.config.variants[variant], keys)
        given = {**own, **keys, self.config.over: value}
        return [
            self._planner.run({**where, "seed": seed}, given, seed=seed)
            for seed in self.config.seeds
        ]

    def analyse(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return where every curve is lowest at every width, and the verdicts."""
        found = [
            found_of(
                Curve(variant, convention, self._sweeps(outcomes, variant, convention)),
                self.config.name,
            )
            for variant, convention in self.config.curves
        ]
        judged = [f.transfers for f in found if f.convention in self.config.judged]
        passed = None if not judged or None in judged else all(judged)
        return {"over": self.config.over, "curves": [asdict(f) for f in found], "passed": passed}

    def _sweeps(
        self, outcomes: Outcomes, variant: str, convention: ConventionT
    ) -> dict[int, Sweep]:
        points: dict[int, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for outcome in outcomes.values():
            where = outcome.run.coordinates
            if where["variant"] != variant or where.get("convention", convention) != convention:
                continue
            losses = points[int(where["width"])][float(where[self.config.name])]
            if not math.isnan(outcome.loss):
                losses[int(where["seed"])] = outcome.loss
        return {
            width: Sweep(tuple(Point(value, each[value]) for value in sorted(each)))
            for width, each in sorted(points.items())
        }

    def page(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        from muonscale.lab.studies.transfer.report import transfer_page

        return transfer_page(self.config, found, outcomes)
