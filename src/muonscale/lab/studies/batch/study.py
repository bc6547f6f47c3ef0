"""`study batch`: how many tokens and steps it takes to a loss, by batch size and optimizer.

Every variant has the same number of learning rates and the same seeds at every batch size. From the
held-out curves follow T(B) and S(B), the ratio of tokens R(B) of the baseline to another variant, and
critical batch sizes (Practical Efficiency of Muon, arXiv 2505.02222, section 3 and appendix F).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config, read_recipe
from muonscale.lab.config.sections import DataSection, ScheduleSection, Stage
from muonscale.lab.report.page import Page
from muonscale.lab.studies.config import (
    StudyConfig,
    check_equal_effort,
    check_variants,
    named_overrides,
)
from muonscale.lab.studies.frontier.config import FrontierSection
from muonscale.lab.studies.study import Coordinate, Outcomes, PlannedRun, Planner
from muonscale.lab.studies.variants import VARIANTS, variant_keys

RuleT = Literal["sqrt", "linear", "none"]
POWERS: dict[str, float] = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}
"""Power of batch / reference batch that learning rates are multiplied by."""

OWN = (
    "optimizer.lr",
    "train.batch_tokens",
    "train.batch_schedule",
    "train.steps",
    "eval.every",
)
"""Keys that the study sets for every run."""

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class BatchConfig(StudyConfig):
    """Keys of a batch study."""

    study: Literal["batch"] = "batch"
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=2)] = {"adamw": {}, "muon": {}}
    """Optimizers, as for `compare`."""
    baseline: str = "adamw"
    """The variant whose tokens are divided by the others': the numerator of R."""
    batches: Annotated[list[Count], Field(min_length=3)]
    """Batch sizes in tokens, in rising order; multiples of data.sequence_length."""
    lr: Annotated[list[Positive], Field(min_length=1)]
    """Learning rates at the reference batch, in rising order."""
    lr_of: dict[str, list[Positive]] = {}
    """Other learning rates of a variant, as many."""
    lr_rule: RuleT = "sqrt"
    """What learning rates are multiplied by: the square root of batch / reference, that itself, or 1."""
    reference_batch: Count | None = None
    """The smallest batch when not given."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0, 1]
    steps: Count = 50
    """Least number of steps of a run: it has max(train.tokens, steps * batch) tokens."""
    evaluations: Annotated[int, Field(ge=2)] = 40
    """About how many times a run is evaluated."""
    targets: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Held-out losses to reach; chosen from the finished curves when not given."""
    frontier: FrontierSection = FrontierSection()
    """The compute-time frontier that is drawn from the runs: changes none of them."""

    @field_validator("variants", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return named_overrides(value, "variants", VARIANTS)

    @model_validator(mode="after")
    def _in_order(self) -> BatchConfig:
        for name, values in [("batches", self.batches), ("lr", self.lr), *self.lr_of.items()]:
            if sorted(set(values)) != values:
                raise ValueError(f"{name}={values} must rise from one to the next")
        for name, values in [("seeds", self.seeds), ("targets", self.targets or [])]:
            if len(set(values)) != len(values):
                raise ValueError(f"{name}={values} repeats one; give each once")
        return self

    @model_validator(mode="after")
    def _equal_effort(self) -> BatchConfig:
        check_variants("baseline", [self.baseline], self.variants)
        check_variants("lr_of", self.lr_of, self.variants)
        check_equal_effort(self.lr, self.lr_of)
        return self

    @property
    def reference(self) -> int:
        """The batch size whose learning rates are those of `lr`."""
        return self.reference_batch or self.batches[0]

    def rates(self, variant: str, batch: int) -> list[float]:
        """Return the learning rates of a variant at a batch size, to six digits."""
        factor = (batch / self.reference) ** POWERS[self.lr_rule]
        return [float(f"{lr * factor:.6g}") for lr in self.lr_of.get(variant, self.lr)]

    @property
    def others(self) -> list[str]:
        """Variants that the baseline is divided by."""
        return [name for name in self.variants if name != self.baseline]


@dataclass(frozen=True)
class Batch:
    """The study."""

    config: BatchConfig

    @cached_property
    def _planner(self) -> Planner:
        return Planner(self.config)

    @cached_property
    def _base(self) -> Config:
        """The recipe of all runs at the smallest batch."""
        self._check()
        smallest = {"train.batch_tokens": self.config.batches[0]}
        config = self._planner.run({}, smallest, seed=0).config
        if config.train.tokens is None or config.train.batch_schedule:
            key = "batch_schedule" if config.train.batch_schedule else "steps"
            raise ConfigError(
                f"the recipe has train.{key}={getattr(config.train, key)}: runs of one batch size each, of "
                "equal tokens, are compared, so give train.tokens alone"
            )
        return config

    def _check(self) -> None:
        if wrong := [key for key in OWN if key in self.config.set]:
            raise ConfigError(f"set.{wrong[0]}: the study sets {', '.join(OWN)} itself")
        data = read_recipe(self.config.base).get("data", {})
        default = data.get("sequence_length", DataSection.model_fields["sequence_length"].default)
        length = self.config.set.get("data.sequence_length", default)
        for batch in self.config.batches:
            if batch % length:
                raise ConfigError(
                    f"batches: {batch} is not a multiple of data.sequence_length={length}; accepted near it are "
                    f"{batch // length * length or length} and {(batch // length + 1) * length}"
                )

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
        coordinates: dict[str, Coordinate] = {
            "variant": variant,
            "batch": batch,
            "lr": lr,
            "seed": seed,
        }
        tokens = max(self._base.train.tokens or 0, self.config.steps * batch)
        steps = math.ceil(tokens / batch)
        keys = {
            "train.tokens": tokens,
            "train.batch_tokens": batch,
            "eval.every": max(1, steps // self.config.evaluations),
        }
        own = variant_keys(self._planner, variant, self.config.variants[variant], keys)
        return self._planner.run(coordinates, own, keys, {"optimizer.lr": lr}, seed=seed)

    def analyse(self, outcomes: Outcomes) -> dict[str, Any]:
        """Return tokens to every target, their ratios, critical batch sizes and what they say."""
        from muonscale.lab.studies.batch.analysis import found_of, steps_of
        from muonscale.lab.studies.batch.noise import noise_scales
        from muonscale.lab.studies.frontier.analysis import frontier_of

        config = self.config
        found = found_of(config, outcomes, by_length=follows_length(self._base.schedule))
        return found | {
            "noise_scale": noise_scales(found["targets"], outcomes),
            "frontier": frontier_of(
                config.frontier,
                steps_of(found),
                outcomes,
                self._base.data.sequence_length,
                baseline=config.baseline,
            ),
        }

    def page(self, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
        """Return the report."""
        from muonscale.lab.studies.batch.report import batch_page

        return batch_page(self.config, found, outcomes)


def follows_length(schedule: ScheduleSection) -> bool:
    """Return whether the learning rate at a step depends on how long the run is going to be."""
    stages = schedule.stages or [Stage.model_validate(schedule.model_dump(exclude={"stages"}))]
    last = stages[-1]
    return (
        any(stage.until is not None and stage.until < 1 for stage in stages)
        or last.name != "constant"
        or 0 < last.warmup < 1
    )
