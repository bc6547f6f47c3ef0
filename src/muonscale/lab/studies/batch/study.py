"""`study batch`: tokens and steps to a loss by batch size and optimizer.

Every variant has the same number of learning rates and the same seeds at every batch size. The
validation curves give T(B) and S(B), the ratio of tokens R(B) of the baseline to another variant,
and critical batch sizes (Practical Efficiency of Muon, arXiv 2505.02222, section 3 and appendix F).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config, read_recipe
from muonscale.lab.config.sections import DataSection, ScheduleSection
from muonscale.lab.report.page import Page
from muonscale.lab.studies.batch.config import BatchConfig
from muonscale.lab.studies.planned_run import Coordinate, PlannedRun, PlannedStudy
from muonscale.lab.studies.study import Outcomes
from muonscale.lab.studies.variants import resolve_variant

OWN = (
    "optimizer.lr",
    "train.batch_tokens",
    "train.batch_schedule",
    "train.steps",
    "eval.every",
)
"""Keys that the study sets for every run."""


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
        """Return all runs: every variant at every batch size, learning rate and seed."""
        return [
            self._run(variant, batch, lr, seed)
            for variant in self.config.variants
            for batch in self.config.batches
            for lr in self.config.rates(variant, batch)
            for seed in self.config.seeds
        ]

    def _run(self, variant: str, batch: int, lr: float, seed: int) -> PlannedRun:
        where: dict[str, Coordinate] = {"variant": variant, "batch": batch, "lr": lr, "seed": seed}
        tokens = max(self._base.train.tokens or 0, self.config.steps * batch)
        steps = math.ceil(tokens / batch)
        keys = {
            "train.tokens": tokens,
            "train.batch_tokens": batch,
            "eval.every": max(1, steps // self.config.evaluations),
        }
        own = resolve_variant(self.planner, variant, self.config.variants[variant], keys)
        return self.planner.run(where, own, keys, {"optimizer.lr": lr}, seed=seed)

    def analyze(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return tokens to every target, their ratios, critical batch sizes and the frontier."""
        from muonscale.lab.studies.batch.analysis import analyze_targets, read_steps
        from muonscale.lab.studies.batch.noise import collect_noise_scales
        from muonscale.lab.studies.frontier.analysis import analyze_frontier

        config, base = self.config, self._base
        found = analyze_targets(config, outcomes, by_length=depends_on_length(base.schedule))
        return found | {
            "noise_scale": collect_noise_scales(found["targets"], outcomes),
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
