"""The configuration of `study telescope`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from muonscale.lab.config.sections import Positive, Section
from muonscale.lab.studies.config import StudyConfig
from muonscale.lab.studies.study import OF_THE_STUDY
from muonscale.lab.studies.telescope.grid import Place, value_at
from muonscale.lab.studies.telescope.levels import LevelRule

RESERVED = {"width", "seed"}
NOT_TUNED = ("model.", "transfer.")
"""Beginnings of keys that the width decides."""


class HyperParameter(Section):
    """A key of the recipe that is to be found: `hyperparameters.NAME.*`."""

    key: str
    """Such as `optimizer.lr`."""
    centre: Annotated[float, Field(gt=0)]
    """The middle of the first grid, on a logarithmic scale."""
    ratio: Annotated[float, Field(gt=1)] = 2.0
    """Of two neighbours of the first grid; the next one has its root."""


class TelescopeConfig(StudyConfig):
    """Keys of a telescope."""

    study: Literal["telescope"] = "telescope"
    hyperparameters: Annotated[dict[str, HyperParameter], Field(min_length=1)]
    """By the names that runs and report have for them."""
    points: Annotated[int, Field(ge=3)] = 5
    """Values of each hyper-parameter at the base width."""
    least_points: Literal[1, 3] = 1
    """Fewest values at any width: 3 shows at the last ones too how flat the loss is."""
    base_width: Positive
    """Of the first grid."""
    calibration_width: Positive
    """Of the last grid: the base width doubled some times."""
    target_width: Positive
    """Of the model that all this is for."""
    grow: Literal["heads", "head_dim"] = "heads"
    """What a wider model has more of: attention heads, or numbers in each."""
    convention: Literal["spectral", "adam_table", "standard"] = "spectral"
    """How values are carried to another width: `transfer.convention`."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0, 1]
    """Of every place of every grid; the best place has the lowest mean loss."""
    target_seeds: Annotated[list[int], Field(min_length=1)] = [0]
    """Of the target."""
    extend: Annotated[int, Field(ge=0)] = 2
    """Lines of places that may be added to the grid of each level where its best place is at an end."""
    brute_force: bool = False
    """Sweep the first grid at the calibration width too, to see what telescoping loses."""

    @model_validator(mode="after")
    def _widths(self) -> TelescopeConfig:
        doublings = self.calibration_width // self.base_width
        if doublings * self.base_width != self.calibration_width or doublings & (doublings - 1):
            raise ValueError(
                f"calibration_width={self.calibration_width} is not base_width={self.base_width} "
                "doubled some times"
                "; give such a width"
            )
        if self.target_width <= self.calibration_width:
            raise ValueError(
                f"target_width={self.target_width} must be larger than "
                f"calibration_width={self.calibration_width}"
            )
        return self

    @model_validator(mode="after")
    def _keys(self) -> TelescopeConfig:
        keys = [item.key for item in self.hyperparameters.values()]
        for name, item in self.hyperparameters.items():
            where = f"hyperparameters.{name}"
            if name in RESERVED:
                raise ValueError(f"{where}: width and seed are the study's; choose another name")
            if "." not in item.key:
                raise ValueError(
                    f"{where}.key={item.key!r} is not of the form section.key, which it must be"
                )
            if item.key in OF_THE_STUDY or item.key.startswith(NOT_TUNED):
                raise ValueError(
                    f"{where}.key={item.key}: the study sets it for every width itself"
                    "; leave it out"
                )
            if keys.count(item.key) > 1:
                raise ValueError(
                    f"{where}.key={item.key}: another hyper-parameter has it too"
                    "; leave one of them out"
                )
        given = [key for key in self.set if key in keys or key.startswith("transfer.base")]
        if given:
            raise ValueError(f"set.{given[0]}: the study sets it for every run itself")
        for name in ("seeds", "target_seeds"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} repeat one; give each once")
        return self

    @property
    def rule(self) -> LevelRule:
        """What the levels follow from."""
        number = (self.calibration_width // self.base_width).bit_length()
        return LevelRule(
            widths=tuple(self.base_width * 2**level for level in range(number)),
            count=len(self.hyperparameters),
            points=self.points,
            least_points=self.least_points,
            extend=self.extend,
        )

    def values(self, place: Place) -> dict[str, float]:
        """Return the values of the hyper-parameters at a place, by name."""
        items = self.hyperparameters.items()
        return {
            name: value_at(item.centre, item.ratio, offset)
            for (name, item), offset in zip(items, place, strict=True)
        }
