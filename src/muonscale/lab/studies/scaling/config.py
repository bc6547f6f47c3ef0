"""The configuration of `study scaling`: the ladder, its learning rates and its batches."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from muonscale.errors import shown
from muonscale.lab.config.sections import Positive, Section
from muonscale.lab.fits.result import LEAST_RESAMPLES
from muonscale.lab.studies.config import (
    Number,
    check_distinct,
    check_overrides,
    check_variants,
)
from muonscale.lab.studies.search.config import SearchSection
from muonscale.lab.studies.variants import VariantsConfig
from muonscale.transfer.options import ConventionT

RULED = {"optimizer.lr": "lr", "train.batch_tokens": "batch"}
"""Keys of the recipe that a rule may give, with the names of the rules."""


class PowerRule(Section):
    """`coefficient * C^exponent`, with C = 6 N D and N without embeddings (Moonlight, table 9)."""

    coefficient: Number
    exponent: float


def _check_rule(value: Any, info: ValidationInfo) -> Any:
    """Return a rule unchanged, or raise an error that names all forms; pydantic's does not."""
    rule = value.model_dump() if isinstance(value, PowerRule) else value
    if isinstance(rule, dict):
        exponent = rule.get("exponent")
        known = rule.keys() == PowerRule.model_fields.keys()
        right = known and _above_zero(rule["coefficient"]) and isinstance(exponent, int | float)
    else:
        right = _above_zero(rule)
    if not right:
        raise ValueError(
            f"{info.field_name}={value!r} must be a number above 0, or "
            "{coefficient: NUMBER, exponent: NUMBER}; `search` is for what has to be found"
        )
    return value


def _above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


Rule = Annotated[Number | PowerRule, BeforeValidator(_check_rule)]
"""One value for all rungs, or a rule."""


class Rung(Section):
    """An item of `ladder`: a size of model and the length of its runs."""

    width: Positive | None = None
    """Width of the model; the base recipe's when not given."""
    layers: Positive | None = None
    """Layers of the model; the base recipe's when not given."""
    tokens: Positive
    other_tokens: list[Positive] = []
    """Other lengths of runs at the same settings: a law of N and D needs them, one of C leaves them
    out."""
    set: dict[str, Any] = {}
    """Keys of the recipe to change on this rung."""

    @field_validator("set", mode="before")
    @classmethod
    def _check_set(cls, value: Any) -> Any:
        return check_overrides(value, "ladder.N.set")

    @model_validator(mode="after")
    def _check_lengths(self) -> Rung:
        check_distinct("ladder: tokens and other_tokens", self.lengths)
        return self

    @property
    def lengths(self) -> list[int]:
        """All lengths, `tokens` first."""
        return [self.tokens, *self.other_tokens]


class ScalingConfig(VariantsConfig):
    """Keys of a scaling study."""

    study: Literal["scaling"] = "scaling"
    baseline: str = "adamw"
    """The optimizer whose FLOPs the others are compared with."""
    ladder: Annotated[list[Rung], Field(min_length=3)]
    """Sizes, the smallest first. A law with intervals needs four, or three with two seeds."""
    search: SearchSection | None = None
    """Keys that are searched for every variant on every rung, or on the first one for all
    (`search.at`)."""
    lr: Rule | None = None
    """The learning rate of all rungs, or {coefficient, exponent}; the recipe's when neither given
    nor searched."""
    lr_of: dict[str, Rule] = {}
    """Another one for an optimizer."""
    batch: Rule | None = None
    """Tokens of a step, given in the same ways; the recipe's `train.batch_tokens` when neither
    given nor searched."""
    batch_of: dict[str, Rule] = {}
    """Another one for an optimizer."""
    transfer: ConventionT | None = None
    """Convention by which learning rate, decay and initial weights change from the first rung
    on."""
    resamples: Annotated[int, Field(ge=LEAST_RESAMPLES)] = 1000
    """Tables drawn for the intervals."""

    @model_validator(mode="after")
    def _check(self) -> ScalingConfig:
        check_variants("baseline", [self.baseline], self.variants)
        for key in ("lr_of", "batch_of"):
            check_variants(key, getattr(self, key), self.variants)
        if self.search is not None:
            self.search.check_study(self)
            for number, rung in enumerate(self.ladder):
                self.search.check_given(f"ladder.{number}.set", rung.set, self.variants)
            for item in self.search.keys.values():
                name = RULED.get(item.key)
                if name and (getattr(self, name) is not None or getattr(self, f"{name}_of")):
                    raise ValueError(f"{name}: search.keys has {item.key} too; leave one out")
        check_distinct("seeds", self.seeds)
        shapes = [f"{rung.width} {rung.layers} {sorted(rung.set.items())}" for rung in self.ladder]
        if twice := [shape for shape in shapes if shapes.count(shape) > 1]:
            raise ValueError(
                f"ladder: two rungs are the same size, {shown(twice[0])}; give other lengths of a "
                "size as its other_tokens"
            )
        return self

    def rules(self, variant: str) -> dict[str, Rule]:
        """Return the rules of a variant by the key of the recipe."""
        lr, batch = self.lr_of.get(variant, self.lr), self.batch_of.get(variant, self.batch)
        found = dict(zip(RULED, (lr, batch), strict=True))
        return {key: rule for key, rule in found.items() if rule is not None}
