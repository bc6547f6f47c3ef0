"""The configuration of `study batch`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from muonscale.lab.config.sections import Positive
from muonscale.lab.studies.config import (
    Number,
    check_distinct,
    check_rising,
    check_variants,
)
from muonscale.lab.studies.frontier.config import FrontierSection
from muonscale.lab.studies.search.config import SearchSection
from muonscale.lab.studies.variants import VariantsConfig

OWN = ("train.batch_tokens", "train.batch_schedule", "train.steps", "eval.every")
"""Keys that the study sets for every run."""


class BatchConfig(VariantsConfig):
    """Keys of a batch study."""

    study: Literal["batch"] = "batch"
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=2)] = {"adamw": {}, "muon": {}}
    baseline: str = "adamw"
    """The variant whose tokens are divided by the others' tokens: the numerator of R."""
    batches: Annotated[list[Positive], Field(min_length=3)]
    """Batch sizes in tokens, in rising order; multiples of data.sequence_length."""
    search: SearchSection
    """Keys that are searched for every variant at every batch size, or at the first for all."""
    steps: Positive = 50
    """Fewest steps of a run: a run has max(train.tokens, steps * batch) tokens."""
    evaluations: Annotated[int, Field(ge=2)] = 40
    """Approximate number of evaluations of a run."""
    targets: Annotated[list[Number], Field(min_length=1)] | None = None
    """Validation losses to reach; chosen from the finished curves when not given."""
    frontier: FrontierSection = FrontierSection()
    """The compute-time frontier drawn from the runs; it changes none of them."""

    @model_validator(mode="after")
    def _check(self) -> BatchConfig:
        check_rising("batches", self.batches)
        for name, item in self.search.keys.items():
            if item.key in OWN:
                raise ValueError(f"search.keys.{name}.key={item.key}: the study sets it itself")
        self.search.check_study(self)
        check_distinct("seeds", self.seeds)
        check_distinct("targets", self.targets or [])
        check_variants("baseline", [self.baseline], self.variants)
        return self

    @property
    def others(self) -> list[str]:
        """The variants other than the baseline."""
        return [name for name in self.variants if name != self.baseline]
