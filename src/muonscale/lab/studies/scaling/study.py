"""`study scaling`: how the loss falls with operations, parameters and tokens, by optimizer.

A ladder of model sizes, each with its length of runs. Learning rate and batch of every rung come from
a rule, from the first rung by transfer, or from a small search of the rung's own. The laws are
`muonscale.lab.fits`': L = a C^-b over the ladder, and L(N, D) where rungs have several lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from muonscale.lab.report.page import Page
from muonscale.lab.studies.scaling.analysis import Measured, Search, Setting, found_in
from muonscale.lab.studies.scaling.config import Choice, PowerRule, Rung, ScalingConfig
from muonscale.lab.studies.study import Expected, Outcome, Outcomes, PlannedRun, Planner
from muonscale.lab.studies.variants import Overrides, variant_keys

if TYPE_CHECKING:
    from muonscale.lab.estimate.run_cost import RunCost

PER_PARAMETER = 6
"""Operations of a training token by each parameter, in C = 6 N D."""


@dataclass(frozen=True)
class Scaling:
    """The study."""

    config: ScalingConfig
    _costs: dict[tuple[str, int], RunCost] = field(default_factory=dict)

    @cached_property
    def _planner(self) -> Planner:
        return Planner(self.config)

    @cached_property
    def _fields(self) -> list[Overrides]:
        """Fields of the model on every rung."""
        from muonscale.lab.models.widen import fields_at
        from muonscale.lab.training.dry_run import planned_shape

        found: list[Overrides] = []
        for rung in self.config.ladder:
            config = self._planner.run({}, rung.set, seed=0).config
            shape = planned_shape(config)
            fields: dict[str, Any] = {} if rung.width is None else fields_at(shape, rung.width)
            if rung.layers is not None:
                name = shape.attribute_map.get("num_hidden_layers", "num_hidden_layers")
                fields[name] = rung.layers
            found.append({**config.model.fields, **fields})
        return found

    @cached_property
    def names(self) -> list[str]:
        """Names of the rungs: width and layers, or their number where the ladder says neither."""
        return [
            "x".join(str(part) for part in (rung.width, rung.layers) if part) or f"rung {place}"
            for place, rung in enumerate(self.config.ladder, 1)
        ]

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return the searches, and the measured runs of rungs whose settings are known."""
        runs = {run.id: run for run in self._wanted(outcomes)}
        return list(runs.values())

    def _wanted(self, outcomes: Outcomes) -> Iterator[PlannedRun]:
        for variant in self.config.variants:
            for place in range(len(self.config.ladder)):
                for setting in self._searched(variant, place):
                    yield from self._runs(variant, place, setting, self._search_seeds)
                for length, setting in self._settings(outcomes, variant, place).items():
                    yield from self._runs(variant, place, setting, self.config.seeds, length)

    @property
    def _search_seeds(self) -> list[int]:
        return self.config.search_seeds or self.config.seeds

    def _searched(self, variant: str, place: int) -> list[Setting]:
        """Return the settings that are tried on a rung, none if there is nothing to choose."""
        rates, batches = self.config.lr_choice(variant), self.config.batch_choice(variant)
        if not (isinstance(rates, list) or isinstance(batches, list)):
            return []
        if place and self.config.search_at == "first":
            return []
        tokens = self.config.ladder[place].tokens
        return [
            Setting(lr, batch)
            for batch in self._values(batches, place, tokens, batch=True)
            for lr in self._values(rates, place, tokens)
        ]

    def _settings(self, outcomes: Outcomes, variant: str, place: int) -> dict[int, Setting]:
        """Return learning rate and batch of each length of a rung; empty while they are not known."""
        where = 0 if self.config.search_at == "first" else place
        best = None
        if self._searched(variant, where):
            search = self.search(outcomes, variant, where)
            if not search.ended or search.best is None:
                return {}
            best = search.best
        return {
            length: self._setting(variant, place, length, best)
            for length in self.config.ladder[place].lengths
        }

    def _setting(self, variant: str, place: int, tokens: int, best: Setting | None) -> Setting:
        rates, batches = self.config.lr_choice(variant), self.config.batch_choice(variant)
        lr, batch = (None, None) if best is None else (best.lr, best.batch)
        if not isinstance(rates, list):
            (lr,) = self._values(rates, place, tokens)
        if not isinstance(batches, list):
            (batch,) = self._values(batches, place, tokens, batch=True)
        assert lr is not None
        return Setting(lr, batch)

    def _values(
        self, choice: Choice | None, place: int, tokens: int, *, batch: bool = False
    ) -> list[Any]:
        """Return the values that a choice has on a rung, batches in whole sequences."""
        if isinstance(choice, PowerRule):
            n = self.cost(next(iter(self.config.variants)), place).without_embeddings
            found = [choice.coefficient * (PER_PARAMETER * n * tokens) ** choice.exponent]
        else:
            found = choice if isinstance(choice, list) else [choice]
        return [self._whole(place, value) for value in found] if batch else list(found)

    def _whole(self, place: int, tokens: float | None) -> int | None:
        if tokens is None:
            return None
        rung = self.config.ladder[place]
        length = self._planner.run({}, rung.set, seed=0).config.data.sequence_length
        return max(1, round(tokens / length)) * length

    def cost(self, variant: str, place: int) -> RunCost:
        """Return what a run of the rung's own length costs, at the recipe's batch."""
        from muonscale.lab.estimate.run_cost import run_cost

        key = (variant, place)
        if key not in self._costs:
            keys = self._keys(variant, place, self.config.ladder[place].tokens)
            self._costs[key] = run_cost(self._planner.run({}, keys, seed=0).config)
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
        return {
            **keys,
            **variant_keys(self._planner, variant, self.config.variants[variant], keys),
        }

    def _runs(
        self,
        variant: str,
        place: int,
        setting: Setting,
        seeds: Iterable[int],
        tokens: int | None = None,
    ) -> list[PlannedRun]:
        tokens = tokens or self.config.ladder[place].tokens
        keys = {**self._keys(variant, place, tokens), "optimizer.lr": setting.lr}
        where: dict[str, Any] = {
            "variant": variant,
            "rung": self.names[place],
            "tokens": tokens,
            "lr": setting.lr,
        }
        if setting.batch is not None:
            keys["train.batch_tokens"] = where["batch"] = setting.batch
        return [self._planner.run({**where, "seed": seed}, keys, seed=seed) for seed in seeds]

    def search(self, outcomes: Outcomes, variant: str, place: int) -> Search:
        """Return what the search of a rung has found so far."""
        losses = {}
        ended = True
        for setting in self._searched(variant, place):
            runs = self._runs(variant, place, setting, self._search_seeds)
            known = [outcomes[run.id] for run in runs if run.id in outcomes]
            ended &= len(known) == len(runs) and all(outcome.ended for outcome in known)
            losses[setting] = {
                int(o.run.coordinates["seed"]): o.loss for o in known if not math.isnan(o.loss)
            }
        return Search(losses, ended)

    def measured(self, outcomes: Outcomes, variant: str, place: int) -> list[Measured]:
        """Return what was measured on a rung: every length that has been decided on."""
        found = []
        for length, setting in self._settings(outcomes, variant, place).items():
            runs = self._runs(variant, place, setting, self.config.seeds, length)
            cost = replace(
                self.cost(variant, place),
                steps=runs[0].config.steps,
                tokens=runs[0].config.timeline.tokens_before(runs[0].config.steps),
            )
            known: list[Outcome] = [outcomes[run.id] for run in runs if run.id in outcomes]
            losses = {
                int(o.run.coordinates["seed"]): o.loss for o in known if not math.isnan(o.loss)
            }
            main = length == self.config.ladder[place].tokens
            found.append(Measured(variant, self.names[place], setting, main, cost, losses))
        return found

    def expected(self, outcomes: Outcomes) -> list[Expected]:
        """Return all runs: those of searches, and those that are measured apart from them."""
        found = []
        for variant in self.config.variants:
            for place, rung in enumerate(self.config.ladder):
                found += self._expected(variant, place, rung)
        return found

    def _expected(self, variant: str, place: int, rung: Rung) -> Iterator[Expected]:
        name = f"{variant} {self.names[place]}"
        tried, seeds = self._searched(variant, place), self._search_seeds
        if tried:
            (like,) = self._runs(variant, place, tried[0], seeds[:1])
            number = len(tried) * len(seeds)
            yield Expected(
                name=f"{name}: search", part="tuning", like=like, runs=number, most=number
            )
        for length in rung.lengths:
            known = set(seeds) if tried and length == rung.tokens else set()
            if not (own := [seed for seed in self.config.seeds if seed not in known]):
                continue
            first = (tried or self._searched(variant, 0) or [None])[0]
            setting = self._setting(variant, place, length, first)
            (like,) = self._runs(variant, place, setting, own[:1], length)
            yield Expected(
                name=f"{name}: {length:,} tokens",
                part="final",
                like=like,
                runs=len(own),
                most=len(own),
            )

    def analyse(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return the ladder as it was measured, the laws, and the optimizers' operations compared."""
        return found_in(self, outcomes)

    def page(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        from muonscale.lab.studies.scaling.report import scaling_page

        return scaling_page(self, found, outcomes)
