"""Keys of `study scaling`: the ladder, and how its learning rates and batches are chosen."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from muonscale.errors import nearest, shown
from muonscale.lab.config.sections import Positive, Section
from muonscale.lab.fits.bootstrap import LEAST_RESAMPLES
from muonscale.lab.studies.config import (
    StudyConfig,
    check_dotted,
    check_variants,
    named_overrides,
)
from muonscale.lab.studies.variants import VARIANTS

Number = Annotated[float, Field(gt=0)]


class PowerRule(Section):
    """`coefficient * C^exponent`, C being 6 N D with N without embeddings (Moonlight, table 9)."""

    coefficient: Number
    exponent: float


def _choosable(value: Any, info: ValidationInfo) -> Any:
    """Return what chooses a setting as it is; refuse what does not with one sentence."""
    rule = value.model_dump() if isinstance(value, PowerRule) else value
    if isinstance(rule, dict):
        exponent = rule.get("exponent")
        known = rule.keys() == PowerRule.model_fields.keys()
        right = known and _above_zero(rule["coefficient"]) and isinstance(exponent, int | float)
    else:
        right = all(map(_above_zero, rule if isinstance(rule, list) else [rule]))
    if not right:
        raise ValueError(
            f"{info.field_name}: {value!r} is none of what is accepted: a number above 0, a list of such "
            "numbers to search, {coefficient: NUMBER, exponent: NUMBER}"
        )
    return value


def _above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


Choice = Annotated[Number | list[Number] | PowerRule, BeforeValidator(_choosable)]
"""One value everywhere, values to search, or a rule."""


class Rung(Section):
    """A size of model and the length of its runs: an item of `ladder`."""

    width: Positive | None = None
    """The base recipe's when not given, as are the layers."""
    layers: Positive | None = None
    tokens: Positive
    other_tokens: list[Positive] = []
    """Other lengths of runs at the same settings: what a law of N and D needs, and one of C leaves out."""
    set: dict[str, Any] = {}
    """Keys of the recipe that are different on this rung."""

    @field_validator("set", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        return check_dotted(value, "ladder.N.set")

    @model_validator(mode="after")
    def _lengths_differ(self) -> Rung:
        if len(set(self.lengths)) != len(self.lengths):
            raise ValueError(
                f"ladder: tokens={self.tokens} and other_tokens={self.other_tokens} repeat a length"
                "; give each once"
            )
        return self

    @property
    def lengths(self) -> list[int]:
        """All lengths, that of the first law first."""
        return [self.tokens, *self.other_tokens]


class ScalingConfig(StudyConfig):
    """Keys of a scaling study."""

    study: Literal["scaling"] = "scaling"
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Optimizers, as for `compare`."""
    baseline: str = "adamw"
    """Optimizer that the operations of the others are compared with."""
    ladder: Annotated[list[Rung], Field(min_length=3)]
    """Sizes, the smallest first. A law with intervals takes four, or three with two seeds."""
    lr: Choice
    """A learning rate for all rungs, a list to search, or {coefficient, exponent}."""
    lr_of: dict[str, Choice] = {}
    """Another one for an optimizer."""
    batch: Choice | None = None
    """Tokens of a step, chosen alike; the recipe's `train.batch_tokens` when not given."""
    batch_of: dict[str, Choice] = {}
    search_at: Literal["every", "first"] = "every"
    """Where lists are searched: on every rung, or on the first one for all."""
    transfer: Literal["spectral", "adam_table", "standard"] | None = None
    """Convention by which learning rate, decay and initial weights change from the first rung on."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0, 1]
    search_seeds: list[int] = []
    """Seeds of searches; `seeds` when not given."""
    resamples: Annotated[int, Field(ge=LEAST_RESAMPLES)] = 1000
    """Tables drawn for the intervals."""

    @field_validator("variants", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return named_overrides(value, "variants", VARIANTS)

    @model_validator(mode="after")
    def _names_and_orders(self) -> ScalingConfig:
        if self.baseline not in self.variants:
            raise ValueError(
                f"baseline={self.baseline!r} is none of the variants; "
                f"{nearest(self.baseline, self.variants)}"
            )
        for key in ("lr_of", "batch_of"):
            check_variants(key, getattr(self, key), self.variants)
        choices = {"lr": self.lr, "batch": self.batch}
        choices |= {f"lr_of.{name}": choice for name, choice in self.lr_of.items()}
        choices |= {f"batch_of.{name}": choice for name, choice in self.batch_of.items()}
        for name, choice in choices.items():
            if isinstance(choice, list) and (sorted(set(choice)) != choice or len(choice) < 2):
                raise ValueError(f"{name}={choice}: two values or more are needed, rising")
        for key in ("seeds", "search_seeds"):
            if len(set(getattr(self, key))) != len(getattr(self, key)):
                raise ValueError(f"{key}={getattr(self, key)} repeat one; give each once")
        shapes = [self._shape(rung) for rung in self.ladder]
        if twice := [shape for shape in shapes if shapes.count(shape) > 1]:
            raise ValueError(
                f"ladder: two rungs are the same size, {shown(twice[0])}; give more lengths of one as its other_tokens"
            )
        return self

    def _shape(self, rung: Rung) -> str:
        return f"{rung.width} {rung.layers} {sorted(rung.set.items())}"

    def lr_choice(self, variant: str) -> Choice:
        """Return how the learning rate of a variant is chosen."""
        return self.lr_of.get(variant, self.lr)

    def batch_choice(self, variant: str) -> Choice | None:
        """Return how the batch of a variant is chosen."""
        return self.batch_of.get(variant, self.batch)
