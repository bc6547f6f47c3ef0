"""The `search` section of a study: which keys are searched, from where, and how far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from muonscale.lab.config.sections import Positive, Section
from muonscale.lab.studies.config import (
    SET_BY_STUDY,
    Number,
    Seeds,
    check_distinct,
    check_names,
    check_variants,
)
from muonscale.lab.studies.search.descent import Setting
from muonscale.lab.studies.variants import VARIANTS, VariantsConfig

RESERVED = ("variant", "seed", "batch", "rung", "tokens", "width", "convention")
"""Names that runs already use for their other coordinates."""
NOT_SEARCHED = (*SET_BY_STUDY, "train.tokens", "train.steps")
"""Keys that the study sets, the length of a run included: all variants have equal tokens."""


class SearchKey(Section):
    """A key of the recipe to search on a logarithmic grid: `search.keys.NAME.*`."""

    key: str
    """The key, such as `optimizer.lr`."""
    start: Number
    """The value to begin with."""
    start_of: dict[str, Number] = {}
    """Another value to begin with, for a variant."""
    ratio: Annotated[float, Field(ge=1.001, le=1000)] = 2.0
    """Ratio of neighboring values."""
    variants: list[str] | None = None
    """The variants that have this key; null for all."""

    def start_for(self, variant: str) -> float:
        """Return the value to begin with for a variant."""
        return self.start_of.get(variant, self.start)


class SearchSection(Section):
    """The search of a study: `search.*`. All variants try equal numbers of settings."""

    keys: Annotated[dict[str, SearchKey], Field(min_length=1)]
    """Searched keys by the names that runs and report give them, such as `lr` (matrices) and `rest`
    (embedding, head, gains)."""
    settings: Positive = 9
    """Settings that every variant tries at least."""
    most: Positive = 24
    """Settings that every variant tries at most, if one of them has not found a setting whose
    neighbors are all worse."""
    seeds: Seeds = [0]
    """Seeds of every setting; the best setting has the lowest mean loss."""
    at: Literal["every", "first"] = "every"
    """Places at which to search: every one, or the first, whose best settings all others take."""
    begin: Literal["previous", "start"] = "previous"
    """Where the search of a later place begins: at the best setting of the place before, or at
    `start`; then the places do not wait for each other."""

    @model_validator(mode="after")
    def _check(self) -> SearchSection:
        check_names("search.keys", self.keys)
        check_distinct("search.seeds", self.seeds)
        keys = [item.key for item in self.keys.values()]
        for name, item in self.keys.items():
            where = f"search.keys.{name}"
            if name in RESERVED:
                raise ValueError(f"{where}: runs have a {name} already; choose another name")
            if "." not in item.key:
                raise ValueError(f"{where}.key={item.key!r} must have the form section.key")
            if item.key in NOT_SEARCHED:
                raise ValueError(f"{where}.key={item.key}: the study sets it itself")
            if keys.count(item.key) > 1:
                raise ValueError(f"{where}.key={item.key}: another searched key is the same")
        if self.most < self.settings:
            raise ValueError(
                f"search.most={self.most} must be at least search.settings={self.settings}"
            )
        return self

    def check_study(self, study: VariantsConfig) -> None:
        """Raise ValueError for variants that do not fit the study's, or a key that has a value."""
        variants = study.variants
        for name, item in self.keys.items():
            check_variants(f"search.keys.{name}.variants", item.variants or (), variants)
            own = variants if item.variants is None else item.variants
            check_variants(f"search.keys.{name}.start_of", item.start_of, own)
        self.check_given("set", study.set, variants)
        for variant, keys in variants.items():
            if not self.names(variant):
                raise ValueError(f"search.keys: no key is searched for {variant}")
            known = VARIANTS[variant].overrides if variant in VARIANTS else {}
            self.check_given(f"variants.{variant}", keys, [variant])
            if not callable(known):
                self.check_given(f"variants: {variant}", known, [variant])

    def check_given(self, where: str, given: Iterable[str], variants: Iterable[str]) -> None:
        """Raise ValueError if overrides have a key that is searched for one of the variants."""
        for variant in variants:
            for name in self.names(variant):
                if (key := self.keys[name].key) in given:
                    raise ValueError(
                        f"{where} has {key}, which search.keys.{name} searches for {variant}; leave "
                        "one out"
                    )

    def names(self, variant: str) -> tuple[str, ...]:
        """Return the names of the keys that are searched for a variant."""
        items = self.keys.items()
        return tuple(n for n, item in items if item.variants is None or variant in item.variants)

    def values(self, variant: str, setting: Setting) -> dict[str, float]:
        """Return the values of a setting by name, to six digits."""
        found = {}
        for name, offset in zip(self.names(variant), setting, strict=True):
            item = self.keys[name]
            found[name] = float(f"{item.start_for(variant) * item.ratio**offset:.6g}")
        return found

    def first_setting(self, variant: str) -> Setting:
        """Return the setting that a search begins with."""
        return (0,) * len(self.names(variant))

    def first_values(self, variant: str) -> dict[str, float]:
        """Return the values of the first setting by name."""
        return self.values(variant, self.first_setting(variant))

    def overrides(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return values by the key of the recipe, from values by name."""
        return {self.keys[name].key: value for name, value in values.items()}
