"""`study scaling`: how the loss falls with FLOPs, parameters and tokens, by optimizer.

A ladder has model sizes, each with a length of runs. Hyper-parameters of a rung come from a search
on it, from the first rung by transfer, or from a rule. The laws are those of
`muonscale.lab.fits`: L = a C^-b over the ladder, and L(N, D) where rungs have several lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from muonscale.lab.report.page import Page
from muonscale.lab.studies.planned_run import PlannedRun, PlannedStudy
from muonscale.lab.studies.scaling.config import RULED, PowerRule, ScalingConfig
from muonscale.lab.studies.scaling.ladder import MeasuredRung
from muonscale.lab.studies.search.variant_search import (
    VariantSearch,
    expect_search,
    first_stop,
    search_places,
)
from muonscale.lab.studies.study import ExpectedRuns, Outcomes, collect_losses
from muonscale.lab.studies.variants import Overrides, resolve_variant

if TYPE_CHECKING:
    from muonscale.lab.estimate.run_cost import RunCost

PER_PARAMETER = 6
"""FLOPs per parameter and training token, in C = 6 N D."""


@dataclass(frozen=True)
class ScalingStudy(PlannedStudy[ScalingConfig]):
    """A ladder of models. A rung is known by its index in the ladder."""

    _costs: dict[tuple[str, int], RunCost] = field(default_factory=dict)

    @cached_property
    def _fields(self) -> list[Overrides]:
        """Fields of the model on every rung."""
        found: list[Overrides] = []
        for rung in self.config.ladder:
            config = self.planner.run({}, rung.set, seed=0).config
            fields = self.facts.find_fields(config, rung.width, layers=rung.layers)
            found.append({**config.model.fields, **fields})
        return found

    @cached_property
    def names(self) -> list[str]:
        """Names of the rungs: width and layers, or their number if the ladder has neither."""
        return [
            "x".join(str(part) for part in (rung.width, rung.layers) if part) or f"rung {place}"
            for place, rung in enumerate(self.config.ladder, 1)
        ]

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return the searches, and the measured runs of rungs whose settings are known."""
        runs: dict[str, PlannedRun] = {}
        for place, searches in enumerate(self._searched(outcomes)):
            for variant in self.config.variants:
                search = searches.get(variant)
                wanted = [*(search.runs if search else ())]
                for tokens in self.config.ladder[place].lengths:
                    wanted += self._measured(variant, place, tokens, search)
                runs |= {run.id: run for run in wanted}
        return list(runs.values())

    def _searched(self, outcomes: Outcomes) -> list[dict[str, VariantSearch]]:
        """Return the searches by rung and variant, as far as they are known; none if none is asked
        for."""
        ladder, section = self.config.ladder, self.config.search
        if section is None:
            return [{} for _ in ladder]
        makers = [
            partial(self._run, place=place, tokens=rung.tokens) for place, rung in enumerate(ladder)
        ]
        return search_places(section, self.config.variants, makers, outcomes)

    def _measured(
        self, variant: str, place: int, tokens: int, search: VariantSearch | None
    ) -> list[PlannedRun]:
        """Return the runs of a rung and length; none while its setting is not known."""
        if search is not None and search.best is None:
            return []
        values = {} if search is None or search.best is None else search.best
        seeds = self.config.seeds
        return [self._run(variant, values, seed, place=place, tokens=tokens) for seed in seeds]

    def _ruled(self, variant: str, place: int, tokens: int) -> dict[str, Any]:
        """Return what rules give a rung, by key of the recipe; batches are whole sequences."""
        found: dict[str, Any] = {}
        for key, rule in self.config.rules(variant).items():
            value: float = rule if not isinstance(rule, PowerRule) else 0.0
            if isinstance(rule, PowerRule):
                n = self.cost(next(iter(self.config.variants)), place).without_embeddings
                value = rule.coefficient * (PER_PARAMETER * n * tokens) ** rule.exponent
            if key == "train.batch_tokens":
                run = self.planner.run({}, self.config.ladder[place].set, seed=0)
                length = run.config.data.sequence_length
                value = max(1, round(value / length)) * length
            found[key] = value
        return found

    def cost(self, variant: str, place: int) -> RunCost:
        """Return the cost of a run of the rung's own length at the recipe's batch."""
        from muonscale.lab.estimate.run_cost import run_cost

        key = (variant, place)
        if key not in self._costs:
            keys = self._keys(variant, place, self.config.ladder[place].tokens)
            self._costs[key] = run_cost(self.planner.run({}, keys, seed=0).config)
        return self._costs[key]

    def _keys(self, variant: str, place: int, tokens: int) -> Overrides:
        rung, first = self.config.ladder[place], self._fields[0]
        keys: dict[str, Any] = {
            **rung.set,
            "model.fields": self._fields[place],
            "train.tokens": tokens,
            "train.steps": None,
        }
        if place and self.config.transfer is not None:
            keys |= {"transfer.base": first, "transfer.convention": self.config.transfer}
        own = resolve_variant(self.planner, variant, self.config.variants[variant], keys)
        return {**keys, **own}

    def _run(
        self, variant: str, values: Mapping[str, float], seed: int, *, place: int, tokens: int
    ) -> PlannedRun:
        searched = {} if self.config.search is None else self.config.search.overrides(values)
        ruled = self._ruled(variant, place, tokens)
        where: dict[str, Any] = {"variant": variant, "rung": self.names[place], "tokens": tokens}
        where |= {**{RULED[key]: value for key, value in ruled.items()}, **values}
        keys = {**self._keys(variant, place, tokens), **ruled, **searched}
        return self.planner.run({**where, "seed": seed}, keys, seed=seed)

    def measure(self, outcomes: Outcomes) -> list[MeasuredRung]:
        """Return all measured runs, optimizer by optimizer, in the order of the ladder."""
        found = []
        for variant in self.config.variants:
            for place, searches in enumerate(self._searched(outcomes)):
                search = searches.get(variant)
                for tokens in self.config.ladder[place].lengths:
                    runs = self._measured(variant, place, tokens, search)
                    if not runs:
                        continue
                    steps = runs[0].config.steps
                    trained = runs[0].config.timeline.tokens_before(steps)
                    cost = replace(self.cost(variant, place), steps=steps, tokens=trained)
                    losses = collect_losses(outcomes[run.id] for run in runs if run.id in outcomes)
                    ruled = self._ruled(variant, place, tokens)
                    values = {RULED[key]: value for key, value in ruled.items()}
                    values |= (search.best if search else None) or {}
                    main = tokens == self.config.ladder[place].tokens
                    name = self.names[place]
                    found.append(MeasuredRung(variant, name, values, main, cost, losses, search))
        return found

    def expected(self, outcomes: Outcomes) -> list[ExpectedRuns]:
        """Return the runs of searches, and the measured runs that no search has done."""
        found, section = [], self.config.search
        searched = self._searched(outcomes)
        for variant in self.config.variants:
            start = {} if section is None else section.first_values(variant)
            for place, rung in enumerate(self.config.ladder):
                name, seed = f"{variant} {self.names[place]}", self.config.seeds[0]
                here = section is not None and (place == 0 or section.at == "every")
                search = searched[place].get(variant) if place < len(searched) else None
                if section is not None and here:
                    example = self._run(variant, start, seed, place=place, tokens=rung.tokens)
                    found.append(expect_search(section, name, example, search))
                for tokens in rung.lengths:
                    done = section.seeds if section and here and tokens == rung.tokens else []
                    own = len(set(self.config.seeds) - set(done))
                    example = self._run(variant, start, seed, place=place, tokens=tokens)
                    found.append(
                        ExpectedRuns(
                            name=f"{name}: {tokens:,} tokens",
                            part="final",
                            example=example,
                            runs=own,
                            most=own,
                        )
                    )
        return found

    def analyze(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return the measured ladder, the laws, and the FLOPs of the optimizers at equal loss."""
        from muonscale.lab.studies.scaling.analysis import analyze_ladder

        stopped = first_stop(self._searched(outcomes))
        return analyze_ladder(self.config, self.measure(outcomes), stopped)

    def report(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        from muonscale.lab.studies.scaling.report import report_ladder

        return report_ladder(self.config, self.names, self.measure(outcomes), found)
