"""`study transfer`: whether the best learning rate stays the same when the model gets wider.

For every optimizer and convention of `muonscale.transfer` it measures loss over a hyper-parameter
at several widths, with seeds; finds where each curve is lowest, with an interval; and gives a
verdict. With `search` the other hyper-parameters are searched for every optimizer at the first
width, and carried from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

from muonscale.lab.report.page import Page
from muonscale.lab.studies.analysis.sweep import Sweep, build_sweep
from muonscale.lab.studies.planned_run import Coordinate, PlannedRun, PlannedStudy
from muonscale.lab.studies.search.variant_search import (
    VariantSearch,
    expect_search,
    first_stop,
    search_places,
)
from muonscale.lab.studies.study import ExpectedRuns, Outcomes
from muonscale.lab.studies.transfer.config import TransferConfig
from muonscale.lab.studies.variants import Overrides, resolve_variant
from muonscale.transfer.options import ConventionT


@dataclass(frozen=True)
class TransferStudy(PlannedStudy[TransferConfig]):
    """A study of transfer over widths."""

    @cached_property
    def _fields(self) -> dict[int, Overrides]:
        """Fields of the model by width."""
        config = self.planner.run({}, seed=0).config
        return {
            width: {**config.model.fields, **self.facts.find_fields(config, width)}
            for width in self.config.widths
        }

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return the searches at the first width, and the sweeps of variants that are known.

        At the first width nothing is multiplied, and conventions share its runs.
        """
        config = self.config
        searches = self._searches(outcomes)
        runs = [run for search in searches.values() for run in search.runs]
        for variant, convention in config.curves:
            if (others := self._others(searches, variant)) is None:
                continue
            for width in config.widths:
                runs += self._swept(variant, others, width, convention)
        return list({run.id: run for run in runs}.values())

    def _searches(self, outcomes: Outcomes) -> dict[str, VariantSearch]:
        """Return the searches at the first width by variant; empty if none is asked for."""
        section = self.config.search
        if section is None:
            return {}
        make = partial(self._run, width=self.config.widths[0])
        (found,) = search_places(section, self.config.variants, [make], outcomes)
        return found

    def _others(
        self, searches: Mapping[str, VariantSearch], variant: str
    ) -> dict[str, float] | None:
        """Return the best values of a variant, None before they are known."""
        if variant not in searches:
            return {}
        return searches[variant].best

    def _run(
        self,
        variant: str,
        values: Mapping[str, float],
        seed: int,
        width: int,
        convention: ConventionT | None = None,
    ) -> PlannedRun:
        """Return a run; values have the name of `over`, and those of other searched keys."""
        first = self.config.widths[0]
        where: dict[str, Coordinate] = {"variant": variant}
        keys: dict[str, Any] = {"model.fields": self._fields[width]}
        if width != first:
            where["convention"] = str(convention)
            keys["transfer.convention"] = convention
            keys["transfer.base"] = self._fields[first]
        own = resolve_variant(self.planner, variant, self.config.variants[variant], keys)
        section = self.config.search
        given = {self.config.over: values[self.config.name]}
        if section is not None:
            given = section.overrides(values)
        where |= {"width": width, **values, "seed": seed}
        return self.planner.run(where, {**own, **keys, **given}, seed=seed)

    def _swept(
        self,
        variant: str,
        others: Mapping[str, float],
        width: int,
        convention: ConventionT | None = None,
    ) -> list[PlannedRun]:
        """Return the runs of a sweep, with values of the other keys that were searched."""
        return [
            self._run(variant, {**others, self.config.name: value}, seed, width, convention)
            for value in self.config.values_of.get(variant, self.config.values)
            for seed in self.config.seeds
        ]

    def expected(self, outcomes: Outcomes) -> list[ExpectedRuns]:
        """Return the runs of the searches, and those of the sweeps that no search has done."""
        config, section, found = self.config, self.config.search, []
        searches, first = self._searches(outcomes), config.widths[0]
        for variant in config.variants:
            others, done = self._others(searches, variant), set[str]()
            if section is not None:
                start = section.first_values(variant)
                others = others or start
                done = {run.id for run in searches[variant].runs}
                example = self._run(variant, start, config.seeds[0], first)
                found.append(expect_search(section, variant, example, searches[variant]))
            conventions = [convention for name, convention in config.curves if name == variant]
            for width in config.widths:
                for convention in conventions[:1] if width == first else conventions:
                    runs = self._swept(variant, others or {}, width, convention)
                    number = sum(run.id not in done for run in runs)
                    found.append(
                        ExpectedRuns(
                            name=f"{variant}, width {width}"
                            + ("" if width == first else f", {convention}"),
                            part="final",
                            example=runs[0],
                            runs=number,
                            most=len(runs),
                        )
                    )
        return found

    def analyze(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return where every curve is lowest at every width, and the verdicts."""
        from muonscale.lab.studies.transfer.analysis import analyze_curve

        name, searches = self.config.name, self._searches(outcomes)
        found = [
            analyze_curve(
                variant,
                convention,
                self._sweeps(outcomes, variant, convention, self._others(searches, variant)),
                name,
                tuned=variant not in searches or searches[variant].tuned,
            )
            for variant, convention in self.config.curves
        ]
        judged = [f.transfers for f in found if f.convention in self.config.judged]
        passed = None if not judged or None in judged else all(judged)
        return {
            "over": self.config.over,
            "stopped": first_stop([searches]),
            "curves": [asdict(f) for f in found],
            "searches": [
                {"name": variant, **search.tree()} for variant, search in searches.items()
            ],
            "passed": passed,
        }

    def _sweeps(
        self,
        outcomes: Outcomes,
        variant: str,
        convention: ConventionT,
        best: Mapping[str, float] | None,
    ) -> dict[int, Sweep]:
        """Return the sweeps of an optimizer under a convention by width, at the best values."""
        config, found = self.config, {}
        if best is None:
            return {}
        for width in config.widths:
            runs = self._swept(variant, best, width, convention)
            known = [outcomes[run.id] for run in runs if run.id in outcomes]
            if known:
                found[width] = build_sweep(known, config.name)
        return found

    def report(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        from muonscale.lab.studies.transfer.report import report_transfer

        return report_transfer(self.config, found)
