"""The configuration of `study compare`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from muonscale.errors import nearest
from muonscale.lab.studies.config import Number, check_distinct, parse_named_overrides
from muonscale.lab.studies.search.config import SearchSection
from muonscale.lab.studies.variants import AXES, VariantsConfig

LENGTH = "tokens_per_parameter"
"""The axis of lengths of runs."""


class CompareConfig(VariantsConfig):
    """Keys of a comparison."""

    study: Literal["compare"] = "compare"
    baselines: Annotated[list[str], Field(min_length=1)]
    """Variants that all others are compared with, and whose final losses the others are to
    reach."""
    search: SearchSection
    """Keys that are searched for every variant before it is compared."""
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
        check_distinct("baselines", self.baselines)
        self.search.check_study(self)
        for axis in (*self.axes, LENGTH):
            if axis in self.search.keys:
                raise ValueError(f"search.keys.{axis}: an axis has this name; choose another name")
        for axis, values in self.axes.items():
            for value, keys in values.items():
                self.search.check_given(f"axes.{axis}.{value}", keys, self.variants)
        check_distinct("seeds", self.seeds)
        check_distinct("tokens_per_parameter", self.tokens_per_parameter)
        return self
