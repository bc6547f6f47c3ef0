"""`study telescope`: hyper-parameters for a wide model from grids at narrow ones.

The telescoping algorithm of Practical Efficiency of Muon (arXiv 2505.02222, section 3.2): a full
grid at the base width; then the width doubles, the points per hyper-parameter shrink by 4^(-1/k)
and their spacing by half, around the optimum of the width before; the target is trained with the
last optimum. A level costs about as much as the one before, and halving the spacing follows an
optimum that drifts by O(1/width). Values are those of the base width (`transfer.base`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from muonscale.errors import ConfigError
from muonscale.lab.report.page import Page
from muonscale.lab.studies.cost import Account, estimate_cost
from muonscale.lab.studies.planned_run import PlannedRun, PlannedStudy
from muonscale.lab.studies.study import ExpectedRuns, Outcomes, PartT, collect_losses
from muonscale.lab.studies.telescope.analysis import analyze_telescope
from muonscale.lab.studies.telescope.config import TelescopeConfig
from muonscale.lab.studies.telescope.full_sweep import compare_full_sweep
from muonscale.lab.studies.telescope.grid import Place, most_places
from muonscale.lab.studies.telescope.levels import Level, Losses, build_levels
from muonscale.lab.studies.telescope.report import report_telescope


@dataclass(frozen=True)
class TelescopeStudy(PlannedStudy[TelescopeConfig]):
    """A telescope."""

    @cached_property
    def _fields(self) -> dict[int, dict[str, Any]]:
        """The fields of the model at every width."""
        base = self.planner.run({}, {}, seed=0).config
        if base.transfer.base is not None:
            raise ConfigError(
                f"{self.config.base} has transfer.base={base.transfer.base}: the study sets it for "
                "every width itself; leave it out"
            )
        widths = (*self.config.rule.widths, self.config.target_width)
        return {
            width: self.facts.find_fields(base, width, grow=self.config.grow) for width in widths
        }

    @cached_property
    def _own_fields(self) -> dict[str, Any]:
        return self.planner.run({}, {}, seed=0).config.model.fields

    def run(self, width: int, place: Place, seed: int) -> PlannedRun:
        """Return a run; places are the same at all levels, so no run has two names."""
        config = self.config
        keys: dict[str, Any] = {"model.fields": {**self._own_fields, **self._fields[width]}}
        if width != config.base_width:
            keys["transfer.base"] = self._fields[config.base_width]
            keys["transfer.convention"] = config.convention
        values = config.values(place)
        keys |= {config.hyperparameters[name].key: v for name, v in values.items()}
        return self.planner.run({"width": width, **values, "seed": seed}, keys, seed=seed)

    def known_losses(self, outcomes: Outcomes, width: int, place: Place) -> Losses | None:
        """Return the losses at a place by seed, None while runs are missing."""
        found = {}
        for seed in self.config.seeds:
            outcome = outcomes.get(self.run(width, place, seed).id)
            if outcome is None or not outcome.ended:
                return None
            found[seed] = outcome.loss
        return found

    def levels(self, outcomes: Outcomes) -> list[Level]:
        """Return the levels as far as they are known."""
        return build_levels(
            self.config.rule, lambda width, place: self.known_losses(outcomes, width, place)
        )

    def chosen(self, levels: list[Level]) -> Place | None:
        """Return the optimum of the last level, None before it is found."""
        whole = len(levels) == len(self.config.rule.widths) and levels[-1].done
        return levels[-1].best if whole else None

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return the runs of all known levels, then the target's and those of the full sweep."""
        if not outcomes:  # as the engine begins
            self._check_transfer()
        config, levels = self.config, self.levels(outcomes)
        runs = [
            self.run(level.width, place, seed)
            for level in levels
            for place in level.grid.places
            for seed in config.seeds
        ]
        if (best := self.chosen(levels)) is not None:
            runs += [self.run(config.target_width, best, seed) for seed in config.target_seeds]
            if (width := config.sweep_width) is not None:
                runs += [
                    self.run(width, place, seed)
                    for place in [best, *config.rule.first_grid.places]
                    for seed in config.seeds
                ]
        return list({run.id: run for run in runs}.values())

    def _check_transfer(self) -> None:
        """Raise, before the first grid, if the model cannot be carried to another width."""
        from muonscale.lab.models.build import meta_model
        from muonscale.lab.training.dry_run import planned_shape
        from muonscale.lab.training.param_groups import plan_transfer
        from muonscale.lab.training.setup import build_optimizer

        width = min(width for width in self._fields if width != self.config.base_width)
        place = self.config.rule.first_grid.places[0]
        config = self.run(width, place, self.config.seeds[0]).config
        shape = planned_shape(config)
        transfer = plan_transfer(config, shape)
        build_optimizer(meta_model(shape), config.optimizer, transfer=transfer)

    def expected(self, outcomes: Outcomes) -> list[ExpectedRuns]:
        """Return all runs from the first level to the target, and a sweep at the target."""
        config, rule, seeds = self.config, self.config.rule, len(self.config.seeds)
        full = rule.first_grid
        middle = full.places[len(full.places) // 2]

        def expect(part: PartT, width: int, what: str, number: int, most: int) -> ExpectedRuns:
            example, name = self.run(width, middle, config.seeds[0]), f"{what} {width}"
            return ExpectedRuns(name=name, part=part, example=example, runs=number, most=most)

        found = []
        for (shape, left), width in zip(self._shapes(outcomes), rule.widths, strict=True):
            number, most = most_places(shape, 0), most_places(shape, left)
            what = f"{describe_shape(shape)} at width"
            found.append(expect("tuning", width, what, seeds * number, seeds * most))
        size, of_target = seeds * len(full.places), set(config.target_seeds)
        if config.full_sweep == "target":
            of_target |= set(config.seeds)
        target = len(of_target)
        found.append(expect("final", config.target_width, "target of width", target, target))
        sweep = f"full sweep of {describe_shape(full.shape)} at width"
        if config.sweep_width is not None:
            found.append(expect("check", config.sweep_width, sweep, size, size))
        if config.full_sweep == "target":
            return found
        return [*found, expect("instead", config.target_width, sweep, size, size)]

    def _shapes(self, outcomes: Outcomes) -> Iterator[tuple[tuple[int, ...], int]]:
        """Yield the shape of the grid of every level, and the lines that may still be added."""
        rule, levels = self.config.rule, self.levels(outcomes)
        for level in levels:
            yield level.grid.shape, 0 if level.done else rule.extend - level.lines
        for number in range(len(levels), len(rule.widths)):
            yield (rule.points_at(number),) * rule.count, rule.extend

    def analyze(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return the optimum of every level, how it moves, and the cost of the study."""
        config, levels = self.config, self.levels(outcomes)
        chosen, target, sweep = self.chosen(levels), {}, None
        expected = self.expected(outcomes)
        runs = {e.example.id: e.example for e in expected} | {i: o.run for i, o in outcomes.items()}
        section = config.executor.model_copy(update={"flops_per_second": None})
        spent = Account.of(expected, estimate_cost(runs, outcomes, section, measure=False))
        if chosen is not None:
            ids = [self.run(config.target_width, chosen, s).id for s in config.target_seeds]
            target = collect_losses(outcomes[id] for id in ids if id in outcomes)
            if (width := config.sweep_width) is not None:
                places = config.rule.first_grid.places
                swept = {p: self.known_losses(outcomes, width, p) for p in places}
                near = levels[-1].grid.near(chosen) if width == levels[-1].width else [chosen]
                own = {p: self.known_losses(outcomes, width, p) for p in near}
                if all(own.values()):
                    telescoped = {p: losses for p, losses in own.items() if losses}
                    sweep = compare_full_sweep(config, width, telescoped, chosen, swept, spent)
        return analyze_telescope(config, levels, chosen, target) | {
            "full_sweep": sweep,
            "account": spent.tree(),
        }

    def report(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        return report_telescope(self.config, found)


def describe_shape(shape: tuple[int, ...]) -> str:
    """Return the shape of a grid as text: `5 x 3`, or `5 points` for a single hyper-parameter."""
    return " x ".join(map(str, shape)) + (" points" if len(shape) == 1 else "")
