"""The configuration of `study transfer`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from muonscale.lab.config.sections import Positive
from muonscale.lab.studies.config import (
    Number,
    check_rising,
    check_variants,
)
from muonscale.lab.studies.search.config import SearchSection
from muonscale.lab.studies.variants import VariantsConfig
from muonscale.transfer.options import ConventionT


class TransferConfig(VariantsConfig):
    """Keys of a transfer study."""

    study: Literal["transfer"] = "transfer"
    widths: Annotated[list[Positive], Field(min_length=2)]
    """Widths of the model in rising order; multipliers are relative to the first."""
    over: Literal["optimizer.lr", "optimizer.weight_decay"] = "optimizer.lr"
    """The hyper-parameter, a key of the recipe."""
    values: Annotated[list[Number], Field(min_length=3)]
    """Its values, in rising order, with about the same ratio from one to the next."""
    values_of: dict[str, list[Number]] = {}
    """Other values for an optimizer."""
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = {"muon": {}}
    search: SearchSection | None = None
    """Keys that are searched for every variant at the first width, `over` being one of them; all
    widths take the best values of the others."""
    conventions: Annotated[list[ConventionT], Field(min_length=1)] = ["spectral", "standard"]
    """How hyper-parameters change with the width."""
    conventions_of: dict[str, list[ConventionT]] = {}
    """Other conventions for an optimizer."""
    judged: list[ConventionT] = ["spectral"]
    """Conventions whose verdicts decide the exit code, where they are studied."""

    @model_validator(mode="after")
    def _check(self) -> TransferConfig:
        check_rising("widths", self.widths)
        for name, values in [("values", self.values), *self.values_of.items()]:
            check_rising(name, values, least=3)
        for key in ("values_of", "conventions_of"):
            check_variants(key, getattr(self, key), self.variants)
        if self.search is not None:
            self.search.check_study(self)
            own = self.search.keys.get(self.name)
            if own is None or own.key != self.over or own.variants is not None:
                raise ValueError(
                    f"search.keys.{self.name}: it must be {self.over}, searched for all variants"
                )
            if len(self.search.keys) == 1:
                raise ValueError(
                    f"search.keys: {self.over} alone is what `values` are for; add keys"
                )
            default = SearchSection.model_fields
            if any(getattr(self.search, key) != default[key].default for key in ("at", "begin")):
                raise ValueError(
                    f"search.at={self.search.at} and search.begin={self.search.begin}: this study "
                    "searches at the first width alone; leave both out"
                )
        return self

    @property
    def name(self) -> str:
        """Short name of the hyper-parameter."""
        return {"optimizer.lr": "lr", "optimizer.weight_decay": "wd"}[self.over]

    @property
    def curves(self) -> list[tuple[str, ConventionT]]:
        """Optimizers and conventions."""
        return [
            (variant, convention)
            for variant in self.variants
            for convention in self.conventions_of.get(variant, self.conventions)
        ]
