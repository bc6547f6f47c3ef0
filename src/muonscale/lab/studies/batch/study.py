"""`study batch`: tokens and steps to a loss by batch size and optimizer.

At every batch size the keys of `search` are searched for every variant, for the lowest loss at the
end of the run; the best setting is then run with `seeds`. The validation curves of these runs give
T(B) and S(B), the ratio of tokens R(B) of the baseline to another variant, and critical batch sizes
(Practical Efficiency of Muon, arXiv 2505.02222, section 3 and appendix F).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config, read_recipe
from muonscale.lab.config.sections import DataSection, ScheduleSection
from muonscale.lab.report.page import Page
from muonscale.lab.studies.batch.config import OWN, BatchConfig
from muonscale.lab.studies.planned_run import PlannedRun, PlannedStudy
from muonscale.lab.studies.search.variant_search import (
    VariantSearch,
    expect_best,
    expect_search,
    first_stop,
    search_places,
)
from muonscale.lab.studies.study import ExpectedRuns, Outcomes
from muonscale.lab.studies.variants import resolve_variant


@dataclass(frozen=True)
class BatchStudy(PlannedStudy[BatchConfig]):
    """A study of batch sizes."""

    @cached_property
    def _base(self) -> Config:
        """The recipe of all runs at the smallest batch.

        Raises:
            ConfigError: for keys that the study sets, or batches that are not whole sequences.
        """
        given, batches = self.config.set, self.config.batches
        if wrong := [key for key in OWN if key in given]:
            raise ConfigError(f"set.{wrong[0]}: the study sets {', '.join(OWN)} itself")
        data = read_recipe(self.config.base).get("data", {})
        default = data.get("sequence_length", DataSection.model_fields["sequence_length"].default)
        length = given.get("data.sequence_length", default)
        for batch in batches:
            if batch % length:
                near = (batch // length * length or length, (batch // length + 1) * length)
                raise ConfigError(
                    f"batches: {batch} is not a multiple of data.sequence_length={length}; the "
                    f"nearest are {near[0]} and {near[1]}"
                )
        config = self.planner.run({}, {"train.batch_tokens": batches[0]}, seed=0).config
        if config.train.tokens is None or config.train.batch_schedule:
            key = "batch_schedule" if config.train.batch_schedule else "steps"
            raise ConfigError(
                f"the recipe has train.{key}={getattr(config.train, key)}: the study compares runs "
                "of one batch size each and equal tokens, so give train.tokens alone"
            )
        return config

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return the runs of the searches, and those of best settings that are known."""
        runs: dict[str, PlannedRun] = {}
        for batch, searches in self._searched(outcomes):
            for variant, search in searches.items():
                wanted = [*search.runs, *self._measured(batch, variant, search)]
                runs |= {run.id: run for run in wanted}
        return list(runs.values())

    def _searched(self, outcomes: Outcomes) -> Iterator[tuple[int, dict[str, VariantSearch]]]:
        """Yield the batch sizes, as far as they are known, with the searches of the variants."""
        makers = [partial(self._run, batch) for batch in self.config.batches]
        found = search_places(self.config.search, self.config.variants, makers, outcomes)
        yield from zip(self.config.batches, found, strict=False)

    def _measured(self, batch: int, variant: str, search: VariantSearch) -> list[PlannedRun]:
        if search.best is None:
            return []
        return [self._run(batch, variant, search.best, seed) for seed in self.config.seeds]

    def _run(self, batch: int, variant: str, values: Mapping[str, float], seed: int) -> PlannedRun:
        where = {"variant": variant, "batch": batch, **values, "seed": seed}
        tokens = max(self._base.train.tokens or 0, self.config.steps * batch)
        steps = math.ceil(tokens / batch)
        keys = {
            "train.tokens": tokens,
            "train.batch_tokens": batch,
            "eval.every": max(1, steps // self.config.evaluations),
        }
        own = resolve_variant(self.planner, variant, self.config.variants[variant], keys)
        searched = self.config.search.overrides(values)
        return self.planner.run(where, own, keys, searched, seed=seed)

    def expected(self, outcomes: Outcomes) -> list[ExpectedRuns]:
        """Return the runs of the searches and the measured runs of all batch sizes."""
        config, section = self.config, self.config.search
        known, found = dict(self._searched(outcomes)), []
        for number, batch in enumerate(config.batches):
            for variant in config.variants:
                start = section.first_values(variant)
                example = self._run(batch, variant, start, config.seeds[0])
                name = f"{variant}, batch {batch:,}"
                if here := number == 0 or section.at == "every":
                    search = known.get(batch, {}).get(variant)
                    found.append(expect_search(section, name, example, search))
                title = f"{name}: measured"
                found.append(expect_best(section, title, example, config.seeds, searched=here))
        return found

    def analyze(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return tokens to every target, their ratios, critical batch sizes and the frontier."""
        from muonscale.lab.studies.batch.analysis import analyze_targets, read_steps
        from muonscale.lab.studies.batch.noise import collect_noise_scales
        from muonscale.lab.studies.frontier.analysis import analyze_frontier

        config, base, measured, searches = self.config, self._base, {}, {}
        searched = list(self._searched(outcomes))
        for batch, here in searched:
            for variant, search in here.items():
                runs = self._measured(batch, variant, search)
                measured[variant, batch] = [outcomes[r.id] for r in runs if r.id in outcomes]
                searches[variant, batch] = search
        found = analyze_targets(
            config, measured, searches, by_length=depends_on_length(base.schedule)
        )
        return found | {
            "stopped": first_stop(here for _, here in searched),
            "noise_scale": collect_noise_scales(found["targets"], measured),
            "frontier": analyze_frontier(
                config.frontier,
                read_steps(found),
                outcomes,
                base.data.sequence_length,
                baseline=config.baseline,
            ),
        }

    def report(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        from muonscale.lab.studies.batch.report import report_batches

        return report_batches(self.config, found)


def depends_on_length(schedule: ScheduleSection) -> bool:
    """Return whether the learning rate at a step depends on the planned length of the run."""
    stages = schedule.all_stages
    last = stages[-1]
    return (
        any(stage.until is not None and stage.until < 1 for stage in stages)
        or last.name != "constant"
        or 0 < last.warmup < 1
    )
