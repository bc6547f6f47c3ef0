"""`study telescope`: hyper-parameters for a wide model from grids at narrow ones.

The telescoping algorithm of Practical Efficiency of Muon (arXiv 2505.02222, section 3.2): a whole
grid at the base width; then the width doubles, the points per hyper-parameter shrink by 4^(-1/k) and
their spacing by half, around the optimum of the width before; the target is trained with the last
optimum. A level costs about as much as the one before, and halving the spacing follows an optimum
that drifts by O(1/width). Values mean what they mean at the base width (`transfer.base`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from muonscale.errors import ConfigError
from muonscale.lab.report.page import Page
from muonscale.lab.studies.study import Expected, Outcomes, PartT, PlannedRun, Planner
from muonscale.lab.studies.telescope.config import TelescopeConfig
from muonscale.lab.studies.telescope.grid import Place, most_places
from muonscale.lab.studies.telescope.levels import Level, Losses, levels_of
from muonscale.lab.studies.variants import Overrides


@dataclass(frozen=True)
class Telescope:
    """The study."""

    config: TelescopeConfig

    @cached_property
    def _planner(self) -> Planner:
        return Planner(self.config)

    @cached_property
    def _made(self) -> dict[tuple[int, Place, int], PlannedRun]:
        return {}

    @cached_property
    def _fields(self) -> dict[int, dict[str, Any]]:
        """The fields of the model at every width."""
        from muonscale.lab.models.widen import fields_at
        from muonscale.lab.training.dry_run import planned_shape

        base = self._planner.run({}, {}, seed=0).config
        if base.transfer.base is not None:
            raise ConfigError(
                f"{self.config.base} has transfer.base={base.transfer.base}: the study sets it for every "
                "width itself; leave it out"
            )
        shape = planned_shape(base)
        widths = (*self.config.rule.widths, self.config.target_width)
        return {width: fields_at(shape, width, self.config.grow) for width in widths}

    @cached_property
    def _own_fields(self) -> dict[str, Any]:
        return self._planner.run({}, {}, seed=0).config.model.fields

    def _at_width(self, width: int) -> Overrides:
        """Return what a model of some width is, and where its hyper-parameters were found."""
        keys: dict[str, Any] = {"model.fields": {**self._own_fields, **self._fields[width]}}
        if width != self.config.base_width:
            keys["transfer.base"] = self._fields[self.config.base_width]
            keys["transfer.convention"] = self.config.convention
        return keys

    def run(self, width: int, place: Place, seed: int) -> PlannedRun:
        """Return a run; places are the same at all levels, so no run has two names."""
        key = (width, place, seed)
        if key not in self._made:
            values = self.config.values(place)
            tuned = {self.config.hyperparameters[name].key: v for name, v in values.items()}
            self._made[key] = self._planner.run(
                {"width": width, **values, "seed": seed}, self._at_width(width), tuned, seed=seed
            )
        return self._made[key]

    def known(self, outcomes: Outcomes, width: int, place: Place) -> Losses | None:
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
        return levels_of(self.config.rule, lambda width, place: self.known(outcomes, width, place))

    def chosen(self, levels: list[Level]) -> Place | None:
        """Return the optimum of the last level, None before it is found."""
        whole = len(levels) == len(self.config.rule.widths) and levels[-1].done
        return levels[-1].best if whole else None

    def plan(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Return the runs of all levels known so far, then the target's and the checking ones."""
        if not outcomes:  # as the engine begins
            self._check_transfer()
        runs = {run.id: run for run in self._wanted(self.levels(outcomes))}
        return list(runs.values())

    def _wanted(self, levels: list[Level]) -> Iterator[PlannedRun]:
        config = self.config
        for level in levels:
            for place in level.grid.places:
                yield from (self.run(level.width, place, seed) for seed in config.seeds)
        best = self.chosen(levels)
        if best is None:
            return
        yield from (self.run(config.target_width, best, seed) for seed in config.target_seeds)
        if config.brute_force:
            for place in config.rule.first_grid.places:
                yield from (self.run(config.calibration_width, place, s) for s in config.seeds)

    def _check_transfer(self) -> None:
        """Refuse a model that cannot be carried to another width before the first grid is swept."""
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

    def expected(self, outcomes: Outcomes) -> list[Expected]:
        """Return all runs from the first level to the target, and those of a sweep at the target."""
        config, rule, seeds = self.config, self.config.rule, len(self.config.seeds)
        whole = rule.first_grid
        middle = whole.places[len(whole.places) // 2]

        def runs(part: PartT, width: int, what: str, number: int, most: int) -> Expected:
            like = self.run(width, middle, config.seeds[0])
            name = f"{what} {width}"
            return Expected(name=name, part=part, like=like, runs=number, most=most)

        found = []
        for (shape, left), width in zip(self._shapes(outcomes), rule.widths, strict=True):
            number, most = most_places(shape, 0), most_places(shape, left)
            what = f"{described(shape)} at width"
            found.append(runs("tuning", width, what, seeds * number, seeds * most))
        target, size = len(config.target_seeds), seeds * len(whole.places)
        found.append(runs("final", config.target_width, "target of width", target, target))
        sweep = f"full sweep of {described(whole.shape)} at width"
        if config.brute_force:
            found.append(runs("check", config.calibration_width, sweep, size, size))
        return [*found, runs("instead", config.target_width, sweep, size, size)]

    def _shapes(self, outcomes: Outcomes) -> Iterator[tuple[tuple[int, ...], int]]:
        """Yield the shape of the grid of every level, and the lines that may still be added."""
        rule, levels = self.config.rule, self.levels(outcomes)
        for level in levels:
            yield level.grid.shape, 0 if level.done else rule.extend - level.lines
        for number in range(len(levels), len(rule.widths)):
            yield (rule.points_at(number),) * rule.count, rule.extend

    def analyse(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return what was found at every level, how the optimum moves, and what it all cost."""
        from muonscale.lab.studies.telescope.analysis import found_in

        return found_in(self, outcomes)

    def page(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        from muonscale.lab.studies.telescope.report import telescope_page

        return telescope_page(self.config, found, outcomes)


def described(shape: tuple[int, ...]) -> str:
    """Return the shape of a grid as words: `5 x 3`; `5 points` of a single hyper-parameter."""
    return " x ".join(map(str, shape)) + (" points" if len(shape) == 1 else "")
