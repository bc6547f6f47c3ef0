"""The configuration of `study batch`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from muonscale.lab.config.sections import Positive
from muonscale.lab.studies.config import (
    Number,
    check_distinct,
    check_equal_effort,
    check_rising,
    check_variants,
)
from muonscale.lab.studies.frontier.config import FrontierSection
from muonscale.lab.studies.variants import VariantsConfig

RuleT = Literal["sqrt", "linear", "none"]
POWERS: dict[str, float] = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}
"""Power of batch / reference batch that multiplies learning rates, by `lr_rule`."""


class BatchConfig(VariantsConfig):
    """Keys of a batch study."""

    study: Literal["batch"] = "batch"
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=2)] = {"adamw": {}, "muon": {}}
    baseline: str = "adamw"
    """The variant whose tokens are divided by the others' tokens: the numerator of R."""
    batches: Annotated[list[Positive], Field(min_length=3)]
    """Batch sizes in tokens, in rising order; multiples of data.sequence_length."""
    lr: Annotated[list[Number], Field(min_length=1)]
    """Learning rates at the reference batch, in rising order."""
    lr_of: dict[str, list[Number]] = {}
    """Other learning rates of a variant, equal in number."""
    lr_rule: RuleT = "sqrt"
    """Factor of the learning rates: the square root of batch / reference, batch / reference, or
    1."""
    reference_batch: Positive | None = None
    """The batch size of `lr`; the smallest when not given."""
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
        for name, values in [("batches", self.batches), ("lr", self.lr), *self.lr_of.items()]:
            check_rising(name, values)
        check_distinct("seeds", self.seeds)
        check_distinct("targets", self.targets or [])
        check_variants("baseline", [self.baseline], self.variants)
        check_variants("lr_of", self.lr_of, self.variants)
        check_equal_effort(self.lr, self.lr_of)
        return self

    @property
    def reference(self) -> int:
        """The batch size at which learning rates are those of `lr`."""
        return self.reference_batch or self.batches[0]

    def rates(self, variant: str, batch: int) -> list[float]:
        """Return the learning rates of a variant at a batch size, to six digits."""
        factor = (batch / self.reference) ** POWERS[self.lr_rule]
        return [float(f"{lr * factor:.6g}") for lr in self.lr_of.get(variant, self.lr)]

    @property
    def others(self) -> list[str]:
        """The variants other than the baseline."""
        return [name for name in self.variants if name != self.baseline]
