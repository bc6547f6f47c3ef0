"""`study compare`: optimizers against each other, with equal tokens and equal tuning effort.

Every variant has the same number of learning rates and the same seeds, at every place (a combination
of values of the axes). The best learning rate of each is the one with the lowest mean loss; with
`confirm_seeds` it is run again with seeds that chose nothing, and only these are compared.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from muonscale.errors import nearest
from muonscale.lab.report.page import Page
from muonscale.lab.studies.analysis.sweep import Point, Sweep
from muonscale.lab.studies.compare.analysis import Place, found_at
from muonscale.lab.studies.config import (
    StudyConfig,
    check_equal_effort,
    check_variants,
    named_overrides,
)
from muonscale.lab.studies.study import Coordinate, Outcome, Outcomes, PlannedRun, Planner
from muonscale.lab.studies.variants import AXES, VARIANTS, Overrides, variant_keys

Positive = Annotated[float, Field(gt=0)]


class CompareConfig(StudyConfig):
    """Keys of a comparison."""

    study: Literal["compare"] = "compare"
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Optimizers: names of `muonscale.lab.studies.variants`, or names of one's own with keys of the
    recipe; a known name's keys are added to."""
    baselines: Annotated[list[str], Field(min_length=1)]
    """Variants that all others are compared with, and whose final losses the others are to reach."""
    lr: Annotated[list[Positive], Field(min_length=1)]
    """Learning rates of every variant, in rising order."""
    lr_of: dict[str, list[Positive]] = {}
    """Other learning rates of a variant, as many."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0, 1]
    confirm_seeds: list[int] = []
    """Seeds for the best learning rate of each variant, on which alone they are then compared."""
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    """Places to compare at: by name, its values and their keys of the recipe. `architecture` and
    `corpus` have values that need none."""
    tokens_per_parameter: list[Positive] = []
    """Lengths of the runs, in training tokens per parameter (embeddings included), as one more axis."""

    @field_validator("variants", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return named_overrides(value, "variants", VARIANTS)

    @field_validator("axes", mode="before")
    @classmethod
    def _axes(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"axes={value!r} must map names of axes to their values")
        return {
            axis: named_overrides(values, f"axes.{axis}", AXES.get(axis, {}))
            for axis, values in value.items()
        }

    @model_validator(mode="after")
    def _equal_effort(self) -> CompareConfig:
        for name in self.baselines:
            if name not in self.variants:
                raise ValueError(
                    f"baselines: {name!r} is none of the variants; {nearest(name, self.variants)}"
                )
        for name, rates in [("lr", self.lr), *self.lr_of.items()]:
            if sorted(set(rates)) != rates:
                raise ValueError(f"{name}={rates} must rise from one learning rate to the next")
        check_equal_effort(self.lr, self.lr_of)
        check_variants("lr_of", self.lr_of, self.variants)
        seeds = [*self.seeds, *self.confirm_seeds]
        if len(set(seeds)) != len(seeds):
            raise ValueError(
                f"seeds={self.seeds} and confirm_seeds={self.confirm_seeds} repeat one"
                "; give each once"
            )
        return self

    def rates(self, variant: str) -> list[float]:
        """Return the learning rates of a variant."""
        return self.lr_of.get(variant, self.lr)


@dataclass(frozen=True)
class Compare:
    """The study."""

    config: CompareConfig

    @cached_property
    def _planner(self) -> Planner:
        return Planner(self.config)

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return the tuning runs, and the confirming ones of places whose tuning has ended."""
        runs = []
        for place, overrides in self.places():
            for variant in self.config.variants:
                tuning = [
                    self._run(place, overrides, variant, lr, seed)
                    for lr in self.config.rates(variant)
                    for seed in self.config.seeds
                ]
                runs += [*tuning, *self._confirming(place, overrides, variant, tuning, outcomes)]
        return runs

    def _confirming(
        self,
        place: Mapping[str, Coordinate],
        overrides: Overrides,
        variant: str,
        tuning: list[PlannedRun],
        outcomes: Outcomes,
    ) -> Iterator[PlannedRun]:
        ended = [outcomes[run.id] for run in tuning if run.id in outcomes]
        if not all(o.ended for o in ended) or len(ended) < len(tuning):
            return
        sweep = sweep_of(ended)
        if sweep.best is not None:
            for seed in self.config.confirm_seeds:
                yield self._run(place, overrides, variant, sweep.points[sweep.best].value, seed)

    def places(self) -> Iterator[tuple[dict[str, Coordinate], Overrides]]:
        """Yield the combinations of values of the axes, and their overrides."""
        axes = self.config.axes
        for values in itertools.product(*axes.values()):
            place: dict[str, Coordinate] = dict(zip(axes, values, strict=True))
            keys: Overrides = {
                key: item
                for axis, value in place.items()
                for key, item in {
                    **AXES.get(axis, {}).get(str(value), {}),
                    **axes[axis][str(value)],
                }.items()
            }
            if not self.config.tokens_per_parameter:
                yield place, keys
            for ratio in self.config.tokens_per_parameter:
                yield (
                    {**place, "tokens_per_parameter": ratio},
                    {**keys, **self._length(keys, ratio)},
                )

    def _length(self, keys: Overrides, ratio: float) -> Overrides:
        from muonscale.lab.estimate.run_cost import run_cost

        parameters = run_cost(self._planner.run({}, keys, seed=0).config).parameters
        return {"train.tokens": math.ceil(ratio * parameters)}

    def _run(
        self,
        place: Mapping[str, Coordinate],
        overrides: Overrides,
        variant: str,
        lr: float,
        seed: int,
    ) -> PlannedRun:
        coordinates = {**place, "variant": variant, "lr": lr, "seed": seed}
        keys = variant_keys(self._planner, variant, self.config.variants[variant], overrides)
        return self._planner.run(coordinates, overrides, keys, {"optimizer.lr": lr}, seed=seed)

    def analyse(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return what was found at every place, and with what the runs were done."""
        places = defaultdict(list)
        for outcome in outcomes.values():
            places[_place_of(outcome)].append(outcome)
        return {
            "baselines": self.config.baselines,
            "places": [
                asdict(found_at(self._place(dict(place), each))) for place, each in places.items()
            ],
        }

    def _place(self, name: dict[str, Coordinate], outcomes: list[Outcome]) -> Place:
        tuning = set(self.config.seeds)
        sweeps, confirmed = {}, {}
        for variant in self.config.variants:
            own = [o for o in outcomes if o.run.coordinates["variant"] == variant]
            sweeps[variant] = sweep_of([o for o in own if o.run.coordinates["seed"] in tuning])
            confirmed[variant] = [o for o in own if o.run.coordinates["seed"] not in tuning]
        return Place(name, self.config.baselines, sweeps, confirmed, outcomes)

    def page(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        from muonscale.lab.studies.compare.report import compare_page

        return compare_page(self.config, found, outcomes)


def sweep_of(outcomes: list[Outcome]) -> Sweep:
    """Return the curve over learning rates of runs of one variant at one place."""
    points: dict[float, dict[int, float]] = defaultdict(dict)
    for outcome in outcomes:
        where = outcome.run.coordinates
        losses = points[float(where["lr"])]
        if not math.isnan(outcome.loss):
            losses[int(where["seed"])] = outcome.loss
    return Sweep(tuple(Point(lr, points[lr]) for lr in sorted(points)))


def _place_of(outcome: Outcome) -> tuple[tuple[str, Coordinate], ...]:
    own = ("variant", "lr", "seed")
    return tuple((key, value) for key, value in outcome.run.coordinates.items() if key not in own)
