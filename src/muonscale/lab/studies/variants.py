"""Optimizers, architectures and corpora by name, as overrides of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field, field_validator

from muonscale.lab.config.load import Config
from muonscale.lab.studies.config import Seeds, StudyConfig, parse_named_overrides
from muonscale.lab.studies.planned_run import Planner

Overrides = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An optimizer to compare."""

    overrides: Overrides | Callable[[Config], Overrides]
    """Keys of the recipe, or a function of the run's configuration if they depend on the model."""
    what: str
    source: str


def _muon(what: str, source: str, **options: Any) -> Variant:
    keys = {"rule": "muon", "constraint": None, "row_fraction": 1.0}
    keys |= dict.fromkeys(("second_moment", "pre_norm", "post_norm")) | options
    return Variant(
        overrides={f"optimizer.{key}": value for key, value in keys.items()},
        what=what,
        source=source,
    )


def _one_factor(config: Config) -> Overrides:
    """Return Moonlight's baseline (table 1): for all shapes the factor of a square matrix."""
    from muonscale.lab.training.dry_run import planned_shape

    factor = config.optimizer.rms * math.sqrt(planned_shape(config).hidden_size)
    return {"optimizer.rule": "muon", "optimizer.post_norm": None, "optimizer.scale": factor}


_MOONLIGHT = "arXiv 2502.16982"
_PLUS = "arXiv 2602.21545"
_EQ = "arXiv 2603.28254"

VARIANTS: dict[str, Variant] = {
    "adamw": Variant(
        overrides={"optimizer.rule": "adamw"},
        what="AdamW for every parameter",
        source="Loshchilov and Hutter, arXiv 1711.05101",
    ),
    "muon": _muon("Muon as the recipe has it", f"{_MOONLIGHT}, equation 4"),
    "muon-no-wd": _muon("no weight decay", f"{_MOONLIGHT}, figure 2", weight_decay=0.0),
    "muon-plus-row": _muon("rows normalized", f"{_PLUS}, section 3", post_norm="row"),
    "muon-plus-col": _muon("columns normalized", f"{_PLUS}, section 3", post_norm="col"),
    "muon-plus-row-col": _muon("rows, then columns", f"{_PLUS}, section 3", post_norm="row_col"),
    "muon-plus-col-row": _muon("columns, then rows", f"{_PLUS}, section 3", post_norm="col_row"),
    "normuon": _muon("rows by their variance", "arXiv 2510.05491", post_norm="normuon"),
    "muon-frobenius": _muon(
        "the whole update rescaled", "nanochat: not Muon+ of the paper", post_norm="frobenius"
    ),
    "muoneq-row": _muon("rows normalized before", f"{_EQ}, R", pre_norm="row"),
    "muoneq-col": _muon("columns normalized before", f"{_EQ}, C", pre_norm="col"),
    "muoneq-row-col": _muon("both normalized before", f"{_EQ}, RC", pre_norm="row_col"),
    "muon2": _muon("elements by their RMS", "arXiv 2604.09967", second_moment="gradient"),
    "adamuon": _muon(
        "elements of the update by their RMS",
        "arXiv 2507.11005",
        pre_norm="sign",
        second_moment="update",
        second_moment_eps=1e-8,
        scale="rms_exact",
    ),
    "aurora": _muon("the long side levelled", "arXiv 2606.27715", pre_norm="aurora"),
    "muonh": _muon("a fixed norm of the weights", "arXiv 2606.16899", constraint="weight_norm"),
    "muon-radial-brake": _muon(
        "a braked norm of the weights",
        "NVIDIA Emerging-Optimizers",
        constraint="radial_brake",
    ),
    "dion2": _muon("a quarter of the rows", "arXiv 2512.16928", row_fraction=0.25),
    "muon-heads": _muon("a matrix for each head", "arXiv 2607.24653", heads="auto"),
    "muown": _muon(
        "magnitudes and directions of rows", "arXiv 2605.10797", constraint="row_magnitude"
    ),
    "muon-adjusted-lr": _muon(
        "RMS by the shape", f"{_MOONLIGHT}, table 1, Adjusted LR", scale="rms"
    ),
    "muon-update-norm": _muon(
        "RMS by the update", f"{_MOONLIGHT}, table 1, Update Norm", scale="rms_exact"
    ),
    "muon-one-factor": Variant(
        overrides=_one_factor,
        what="one factor for all shapes, rms*sqrt(hidden size)",
        source=f"{_MOONLIGHT}, table 1, Baseline",
    ),
    **{
        f"muon-rms-{rms:g}": _muon(f"update RMS {rms:g}", f"{_MOONLIGHT}, table 8", rms=rms)
        for rms in (0.05, 0.1, 0.2, 0.4, 0.8)
    },
}
"""Variants by name. Keys that a variant does not set are the recipe's."""

ARCHITECTURES: dict[str, Overrides] = {
    "gpt2": {"model.preset": "gpt-nano"},
    "llama": {"model.preset": "llama-nano"},
    "gemma3": {"model.preset": "gemma-nano"},
    "moonlight": {"model.preset": "moonlight-nano"},
}
CORPORA: dict[str, Overrides] = {
    "python": {"data.source": "python-stdlib"},
    "python-reference": {"data.source": "python-reference"},
}
AXES: dict[str, dict[str, Overrides]] = {"architecture": ARCHITECTURES, "corpus": CORPORA}
"""Values of axes that come with their overrides."""


class VariantsConfig(StudyConfig):
    """Keys of a study of optimizers."""

    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Optimizers: names of `muonscale.lab.studies.variants`, or names of your own with keys of the
    recipe. Keys given to a known name are added to its own."""
    seeds: Seeds = [0, 1]
    """Seeds of every run."""

    @field_validator("variants", mode="before")
    @classmethod
    def _parse_variants(cls, value: Any) -> Any:
        return parse_named_overrides(value, "variants", VARIANTS)


def resolve_variant(
    planner: Planner, name: str, own: Overrides, others: Overrides = MappingProxyType({})
) -> Overrides:
    """Return the keys of a variant: those of its name, if it is known, then its own.

    `others` are keys of the place where it is run, on which its keys may depend.
    """
    if name not in VARIANTS:
        return own
    known = VARIANTS[name].overrides
    if callable(known):
        known = known(planner.run({"variant": name}, others, own, seed=0).config)
    return {**known, **own}
