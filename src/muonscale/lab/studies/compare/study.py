"""`study compare`: optimizers against each other, with equal tokens and equal tuning effort.

At every place (a combination of values of the axes) the keys of `search` are searched for every
variant, all with equal numbers of settings. The best setting of a variant is then run with `seeds`,
and these runs are compared. No verdict is given where a variant is not tuned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

from muonscale.lab.config.load import Config
from muonscale.lab.report.page import Page
from muonscale.lab.studies.compare.config import LENGTH, CompareConfig
from muonscale.lab.studies.planned_run import Coordinate, PlannedRun, PlannedStudy
from muonscale.lab.studies.search.variant_search import (
    VariantSearch,
    expect_best,
    expect_search,
    first_stop,
    search_places,
)
from muonscale.lab.studies.study import ExpectedRuns, Outcome, Outcomes
from muonscale.lab.studies.variants import AXES, Overrides, resolve_variant


@dataclass(frozen=True)
class Place:
    """A combination of values of the axes."""

    values: Mapping[str, Coordinate]
    overrides: Overrides

    @property
    def name(self) -> str:
        """The values as text."""
        return ", ".join(f"{axis} {value}" for axis, value in self.values.items())


@dataclass(frozen=True)
class CompareStudy(PlannedStudy[CompareConfig]):
    """A comparison of optimizers."""

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return the runs of the searches, and those of best settings that are known."""
        runs: dict[str, PlannedRun] = {}
        for place, searches in self._searched(outcomes):
            for variant, search in searches.items():
                wanted = [*search.runs, *self._compared(place, variant, search)]
                runs |= {run.id: run for run in wanted}
        return list(runs.values())

    @cached_property
    def _places(self) -> list[Place]:
        axes, found = self.config.axes, []
        for values in itertools.product(*axes.values()):
            place: dict[str, Coordinate] = dict(zip(axes, values, strict=True))
            keys: dict[str, Any] = {}
            for axis, value in zip(axes, values, strict=True):
                keys |= {**AXES.get(axis, {}).get(value, {}), **axes[axis][value]}
            if not self.config.tokens_per_parameter:
                found.append(Place(place, keys))
                continue
            config = self.planner.run({}, keys, seed=0).config
            parameters = self.facts.find("parameters", config, partial(_parameters, config))
            for ratio in self.config.tokens_per_parameter:
                length = {"train.tokens": math.ceil(ratio * parameters)}
                found.append(Place({**place, LENGTH: ratio}, {**keys, **length}))
        return found

    def _searched(self, outcomes: Outcomes) -> Iterator[tuple[Place, dict[str, VariantSearch]]]:
        """Yield the places, as far as they are known, with the searches of their variants."""
        makers = [partial(self._run, place) for place in self._places]
        found = search_places(self.config.search, self.config.variants, makers, outcomes)
        yield from zip(self._places, found, strict=False)

    def _run(
        self, place: Place, variant: str, values: Mapping[str, float], seed: int
    ) -> PlannedRun:
        coordinates = {**place.values, "variant": variant, **values, "seed": seed}
        keys = resolve_variant(
            self.planner, variant, self.config.variants[variant], place.overrides
        )
        searched = self.config.search.overrides(values)
        return self.planner.run(coordinates, place.overrides, keys, searched, seed=seed)

    def _compared(self, place: Place, variant: str, search: VariantSearch) -> list[PlannedRun]:
        if search.best is None:
            return []
        return [self._run(place, variant, search.best, seed) for seed in self.config.seeds]

    def expected(self, outcomes: Outcomes) -> list[ExpectedRuns]:
        """Return the runs of the searches and the compared runs of all places."""
        config, section, found = self.config, self.config.search, []
        known = dict(enumerate(searches for _, searches in self._searched(outcomes)))
        for number, place in enumerate(self._places):
            for variant in config.variants:
                name = ", ".join(filter(None, (place.name, variant)))
                start = section.first_values(variant)
                example = self._run(place, variant, start, config.seeds[0])
                if here := number == 0 or section.at == "every":
                    search = known.get(number, {}).get(variant)
                    found.append(expect_search(section, name, example, search))
                title = f"{name}: compared"
                found.append(expect_best(section, title, example, config.seeds, searched=here))
        return found

    def analyze(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return the comparison at every place, and cost to equal loss over lengths."""
        from muonscale.lab.studies.compare.analysis import ComparedRuns, analyze_place
        from muonscale.lab.studies.compare.lengths import analyze_lengths

        places, searched = [], list(self._searched(outcomes))
        for place, searches in searched:
            runs = {}
            for variant, search in searches.items():
                ids = [run.id for run in self._compared(place, variant, search)]
                at_best = [outcomes[id] for id in ids if id in outcomes]
                runs[variant] = ComparedRuns(
                    search, [outcome for outcome in at_best if not math.isnan(outcome.loss)]
                )
            places.append((place.values, runs))
        return {
            "baselines": self.config.baselines,
            "stopped": first_stop(searches for _, searches in searched),
            "places": [
                asdict(analyze_place(values, self.config.baselines, runs))
                for values, runs in places
            ],
            "lengths": [asdict(row) for row in analyze_lengths(places, self.config.baselines)],
        }

    def report(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        from muonscale.lab.studies.compare.report import report_comparison

        compared: list[dict[str, list[Outcome]]] = [
            {
                variant: [
                    outcomes[run.id]
                    for run in self._compared(place, variant, search)
                    if run.id in outcomes and math.isfinite(outcomes[run.id].loss)
                ]
                for variant, search in searches.items()
            }
            for place, searches in self._searched(outcomes)
        ]
        return report_comparison(self.config, found, compared)


def _parameters(config: Config) -> int:
    from muonscale.lab.estimate.run_cost import run_cost

    return run_cost(config).parameters
