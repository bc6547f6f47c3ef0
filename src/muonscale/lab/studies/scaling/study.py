"""`study scaling`: how the loss falls with FLOPs, parameters and tokens, by optimizer.

A ladder has model sizes, each with a length of runs. Learning rate and batch of a rung come from a
rule, from the first rung by transfer, or from a small search on the rung. The laws are those of
`muonscale.lab.fits`: L = a C^-b over the ladder, and L(N, D) where rungs have several lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from muonscale.lab.report.page import Page
from muonscale.lab.studies.planned_run import PlannedRun, PlannedStudy
from muonscale.lab.studies.scaling.config import Choice, PowerRule, ScalingConfig
from muonscale.lab.studies.scaling.ladder import LadderSearch, MeasuredRung, Setting
from muonscale.lab.studies.study import ExpectedRuns, Outcomes, PartT, collect_losses
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
        from muonscale.lab.models.widen import fields_at
        from muonscale.lab.training.dry_run import planned_shape

        found: list[Overrides] = []
        for rung in self.config.ladder:
            config = self.planner.run({}, rung.set, seed=0).config
            shape = planned_shape(config)
            fields: dict[str, Any] = {} if rung.width is None else fields_at(shape, rung.width)
            if rung.layers is not None:
                name = shape.attribute_map.get("num_hidden_layers", "num_hidden_layers")
                fields[name] = rung.layers
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
        for variant, place in self._rungs():
            for setting in self._tried_settings(variant, place):
                new = self._runs(variant, place, setting, self._search_seeds)
                runs |= {run.id: run for run in new}
            for length, setting in self._settings(outcomes, variant, place).items():
                new = self._runs(variant, place, setting, self.config.seeds, length)
                runs |= {run.id: run for run in new}
        return list(runs.values())

    def _rungs(self) -> Iterator[tuple[str, int]]:
        """Yield every optimizer with every rung."""
        for variant in self.config.variants:
            for place in range(len(self.config.ladder)):
                yield variant, place

    @property
    def _search_seeds(self) -> list[int]:
        return self.config.search_seeds or self.config.seeds

    def _tried_settings(self, variant: str, place: int) -> list[Setting]:
        """Return the settings to try on a rung, none if there is nothing to choose."""
        rates, batches = self.config.lr_choice(variant), self.config.batch_choice(variant)
        nothing = not (isinstance(rates, list) or isinstance(batches, list))
        if nothing or (place and self.config.search_at == "first"):
            return []
        tokens = self.config.ladder[place].tokens
        return [
            Setting(lr, batch)
            for batch in self._values(batches, place, tokens, batch=True)
            for lr in self._values(rates, place, tokens)
        ]

    def _settings(self, outcomes: Outcomes, variant: str, place: int) -> dict[int, Setting]:
        """Return learning rate and batch by length of a rung; empty while they are not known."""
        where = 0 if self.config.search_at == "first" else place
        best = None
        if self._tried_settings(variant, where):
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
        """Return the values of a choice on a rung; batches are rounded to whole sequences."""
        if isinstance(choice, PowerRule):
            n = self.cost(next(iter(self.config.variants)), place).without_embeddings
            found = [choice.coefficient * (PER_PARAMETER * n * tokens) ** choice.exponent]
        else:
            found = choice if isinstance(choice, list) else [choice]
        if not batch or choice is None:
            return list(found)
        run = self.planner.run({}, self.config.ladder[place].set, seed=0)
        length = run.config.data.sequence_length
        return [max(1, round(value / length)) * length for value in found if value]

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
        where: dict[str, Any] = {"variant": variant, "rung": self.names[place], "tokens": tokens}
        where["lr"] = setting.lr
        if setting.batch is not None:
            keys["train.batch_tokens"] = where["batch"] = setting.batch
        return [self.planner.run({**where, "seed": seed}, keys, seed=seed) for seed in seeds]

    def search(self, outcomes: Outcomes, variant: str, place: int) -> LadderSearch:
        """Return the search of a rung so far."""
        losses, ended = {}, True
        for setting in self._tried_settings(variant, place):
            runs = self._runs(variant, place, setting, self._search_seeds)
            known = [outcomes[run.id] for run in runs if run.id in outcomes]
            ended &= len(known) == len(runs) and all(outcome.ended for outcome in known)
            losses[setting] = collect_losses(known)
        return LadderSearch(losses, ended)

    def measure(self, outcomes: Outcomes) -> list[MeasuredRung]:
        """Return all measured runs, in the order of the ladder."""
        found = []
        for variant, place in self._rungs():
            search = self.search(outcomes, variant, place)
            for length, setting in self._settings(outcomes, variant, place).items():
                runs = self._runs(variant, place, setting, self.config.seeds, length)
                steps = runs[0].config.steps
                tokens = runs[0].config.timeline.tokens_before(steps)
                cost = replace(self.cost(variant, place), steps=steps, tokens=tokens)
                losses = collect_losses(outcomes[run.id] for run in runs if run.id in outcomes)
                main = length == self.config.ladder[place].tokens
                name = self.names[place]
                found.append(MeasuredRung(variant, name, setting, main, cost, losses, search))
        return found

    def expected(self, outcomes: Outcomes) -> list[ExpectedRuns]:
        """Return the runs of searches, and the measured runs that no search has done."""
        found = []
        for variant, place in self._rungs():
            name = f"{variant} {self.names[place]}"
            tried, seeds = self._tried_settings(variant, place), self._search_seeds
            if tried:
                (run,) = self._runs(variant, place, tried[0], seeds[:1])
                found.append(_expect(f"{name}: search", "tuning", run, len(tried) * len(seeds)))
            first = (tried or self._tried_settings(variant, 0) or [None])[0]
            for length in self.config.ladder[place].lengths:
                done = set(seeds) if tried and length == self.config.ladder[place].tokens else set()
                if own := [seed for seed in self.config.seeds if seed not in done]:
                    setting = self._setting(variant, place, length, first)
                    (run,) = self._runs(variant, place, setting, own[:1], length)
                    found.append(_expect(f"{name}: {length:,} tokens", "final", run, len(own)))
        return found

    def analyze(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return the measured ladder, the laws, and the FLOPs of the optimizers at equal loss."""
        from muonscale.lab.studies.scaling.analysis import analyze_ladder

        stopped = None
        for variant, place in self._rungs():
            search = self.search(outcomes, variant, place)
            if search.losses and search.ended and search.best is None and stopped is None:
                name = self.names[place]
                stopped = f"{variant} on rung {name}: no setting of the search has a loss"
        return analyze_ladder(self.config, self.measure(outcomes), stopped)

    def report(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        from muonscale.lab.studies.scaling.report import report_ladder

        return report_ladder(self.config, self.names, self.measure(outcomes), found)


def _expect(name: str, part: PartT, example: PlannedRun, runs: int) -> ExpectedRuns:
    return ExpectedRuns(name=name, part=part, example=example, runs=runs, most=runs)
