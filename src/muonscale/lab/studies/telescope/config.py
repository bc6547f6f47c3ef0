"""The configuration of `study telescope`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from muonscale.lab.config.sections import Positive, Section
from muonscale.lab.studies.config import (
    SET_BY_STUDY,
    Number,
    Seeds,
    StudyConfig,
    check_distinct,
    check_names,
)
from muonscale.lab.studies.telescope.grid import Place, value_at
from muonscale.lab.studies.telescope.levels import LevelRule
from muonscale.transfer.options import ConventionT

RESERVED = {"width", "seed"}
NOT_TUNED = ("model.", "transfer.")
"""Prefixes of keys that the width decides."""


class HyperParameter(Section):
    """A key of the recipe to tune: `hyperparameters.NAME.*`."""

    key: str
    """The key, such as `optimizer.lr`."""
    center: Number
    """The middle of the first grid, on a logarithmic scale."""
    ratio: Annotated[float, Field(gt=1)] = 2.0
    """Ratio of neighboring values of the first grid; each later grid has the square root of the
    ratio before."""


class TelescopeConfig(StudyConfig):
    """Keys of a telescope."""

    study: Literal["telescope"] = "telescope"
    hyperparameters: Annotated[dict[str, HyperParameter], Field(min_length=1)]
    """Hyper-parameters by the names that runs and report give them."""
    points: Annotated[int, Field(ge=3)] = 5
    """Values of each hyper-parameter at the base width."""
    least_points: Literal[1, 3] = 1
    """Fewest values at any width: 3 shows at the last widths too how flat the loss is."""
    base_width: Positive
    """Width of the first grid."""
    calibration_width: Positive
    """Width of the last grid: the base width times a power of two."""
    target_width: Positive
    """Width of the model that the hyper-parameters are for."""
    grow: Literal["heads", "head_dim"] = "heads"
    """Whether a wider model has more attention heads or longer ones."""
    convention: ConventionT = "spectral"
    """How values are carried to another width: `transfer.convention`."""
    seeds: Seeds = [0, 1]
    """Seeds of every place of every grid; the best place has the lowest mean loss."""
    target_seeds: Seeds = [0]
    """Seeds of the target."""
    extend: Annotated[int, Field(ge=0)] = 2
    """Most lines of places to add to the grid of a width whose best place is at an end."""
    full_sweep: Literal["calibration", "target"] | None = None
    """Also sweep the first grid at the calibration or the target width, to measure what telescoping
    loses."""

    @model_validator(mode="after")
    def _check_widths(self) -> TelescopeConfig:
        doublings = self.calibration_width // self.base_width
        if doublings * self.base_width != self.calibration_width or doublings & (doublings - 1):
            raise ValueError(
                f"calibration_width={self.calibration_width} must be base_width={self.base_width} "
                "times a power of two"
            )
        if self.target_width <= self.calibration_width:
            raise ValueError(
                f"target_width={self.target_width} must be larger than "
                f"calibration_width={self.calibration_width}"
            )
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> TelescopeConfig:
        keys = [item.key for item in self.hyperparameters.values()]
        check_names("hyperparameters", self.hyperparameters)
        for name, item in self.hyperparameters.items():
            where = f"hyperparameters.{name}"
            if name in RESERVED:
                raise ValueError(f"{where}: the study uses this name itself; choose another name")
            if "." not in item.key:
                raise ValueError(f"{where}.key={item.key!r} must have the form section.key")
            if item.key in SET_BY_STUDY or item.key.startswith(NOT_TUNED):
                raise ValueError(
                    f"{where}.key={item.key}: the study sets it for every width itself"
                )
            if keys.count(item.key) > 1:
                raise ValueError(f"{where}.key={item.key}: another hyper-parameter has this key")
        given = [key for key in self.set if key in keys or key.startswith("transfer.base")]
        if given:
            raise ValueError(f"set.{given[0]}: the study sets it for every run itself")
        check_distinct("seeds", self.seeds)
        check_distinct("target_seeds", self.target_seeds)
        return self

    @property
    def sweep_width(self) -> int | None:
        """The width of the full sweep; None without one."""
        widths = {"calibration": self.calibration_width, "target": self.target_width}
        return None if self.full_sweep is None else widths[self.full_sweep]

    @property
    def rule(self) -> LevelRule:
        """The rule that lays out the levels."""
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
            name: value_at(item.center, item.ratio, offset)
            for (name, item), offset in zip(items, place, strict=True)
        }
