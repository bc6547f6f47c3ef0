"""The configuration of `study compare`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from muonscale.errors import nearest
from muonscale.lab.studies.config import (
    Number,
    check_distinct,
    check_equal_effort,
    check_rising,
    check_variants,
    parse_named_overrides,
)
from muonscale.lab.studies.variants import AXES, VariantsConfig


class CompareConfig(VariantsConfig):
    """Keys of a comparison."""

    study: Literal["compare"] = "compare"
    baselines: Annotated[list[str], Field(min_length=1)]
    """Variants that all others are compared with, and whose final losses the others are to
    reach."""
    lr: Annotated[list[Number], Field(min_length=1)]
    """Learning rates of every variant, in rising order."""
    lr_of: dict[str, list[Number]] = {}
    """Other learning rates of a variant, equal in number."""
    confirm_seeds: list[int] = []
    """Seeds for the best learning rate of each variant; with them only these runs are compared."""
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    """Places to compare at: values by the name of an axis, with their keys of the recipe.
    `architecture` and `corpus` have values that need no keys."""
    tokens_per_parameter: list[Number] = []
    """Lengths of the runs, in training tokens per parameter (embeddings included), as one more
    axis."""

    @field_validator("axes", mode="before")
    @classmethod
    def _parse_axes(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"axes={value!r} must map names of axes to their values")
        return {
            axis: parse_named_overrides(values, f"axes.{axis}", AXES.get(axis, {}))
            for axis, values in value.items()
        }

    @model_validator(mode="after")
    def _check(self) -> CompareConfig:
        for name in self.baselines:
            if name not in self.variants:
                raise ValueError(
                    f"baselines: {name!r} is none of the variants; {nearest(name, self.variants)}"
                )
        for name, rates in [("lr", self.lr), *self.lr_of.items()]:
            check_rising(name, rates)
        check_equal_effort(self.lr, self.lr_of)
        check_variants("lr_of", self.lr_of, self.variants)
        check_distinct("seeds and confirm_seeds", [*self.seeds, *self.confirm_seeds])
        return self

    def rates(self, variant: str) -> list[float]:
        """Return the learning rates of a variant."""
        return self.lr_of.get(variant, self.lr)
