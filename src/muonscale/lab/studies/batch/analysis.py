"""The findings of a batch study, and its steps to a loss as other analyses read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from muonscale.errors import StudyError, shown
from muonscale.lab.fits.statistics import student_quantile
from muonscale.lab.fits.steps_to_loss import StepsToLoss
from muonscale.lab.studies.analysis.seed_blocks import Blocks, fit_blocks
from muonscale.lab.studies.batch.config import BatchConfig
from muonscale.lab.studies.batch.laws import CriticalBatch, VariantLaws, fit_variant_laws
from muonscale.lab.studies.batch.measurements import (
    Cell,
    Curves,
    Key,
    choose_targets,
    measure_cell,
    read_curves,
)
from muonscale.lab.studies.batch.ratio import TokenRatio, measure_token_ratio
from muonscale.lab.studies.search.variant_search import VariantSearch
from muonscale.lab.studies.study import Outcome

Steps = dict[float, dict[str, StepsToLoss]]
"""By target loss and variant."""

BY_LENGTH = (
    "The learning rate at a step depends on the planned length of the run, and runs of large "
    "batches may be longer: losses on the way are not those of a run that ends there. Give a "
    "constant learning rate, and the warm-up as a number of steps."
)
SAMPLED = (
    "Losses on the way were measured on a part of the validation split, and at the end on all of "
    "it: give eval.tokens at least its size."
)


@dataclass(frozen=True)
class BatchPlace:
    """One variant at one batch size."""

    batch: int
    state: str
    """`reached`, `>`, `<` or `missing`, see `measurements.Cell`."""
    bound: float
    values: dict[str, float] | None
    """The best setting."""
    tuned: bool
    edges: list[str]
    """Ends at which the best setting is, such as `lr high`."""
    log_tokens: float
    """Mean of log T over seeds; NaN if the loss was not reached."""
    error: float
    """Its standard error, without the luck of the seed; NaN without noise to judge by."""
    tokens: float
    low: float
    high: float
    """T and the ends of its 90 % interval."""


@dataclass(frozen=True)
class BatchVariant:
    """One variant on its way to one target."""

    name: str
    places: list[BatchPlace]
    mccandlish: CriticalBatch
    regimes: CriticalBatch
    optimal: CriticalBatch


@dataclass(frozen=True)
class TargetAnalysis:
    """The findings about one loss."""

    target: float
    sigma: float
    """Noise of log T, without seed effects."""
    freedom: int
    variants: list[BatchVariant]
    ratios: list[TokenRatio]


def analyze_targets(
    config: BatchConfig,
    measured: Mapping[Key, list[Outcome]],
    searches: Mapping[Key, VariantSearch],
    *,
    by_length: bool,
) -> dict[str, Any]:
    """Return the findings about all targets, as plain values.

    Args:
        config: of the study.
        measured: runs at the best setting by variant and batch size.
        searches: the searches that found it.
        by_length: whether the learning rate of the runs depends on their length.
    """
    cells = {key: read_curves(runs) for key, runs in measured.items()}
    targets = choose_targets(cells) if config.targets is None else config.targets
    notes = [BY_LENGTH] if by_length else []
    finished = (o for runs in measured.values() for o in runs if o.result is not None)
    if (first := next(finished, None)) is not None:
        records = first.folder.read_metrics("eval")
        if len({r.get("validation_tokens") for r in records}) > 1:
            notes.append(SAMPLED)
    found = []
    for number, target in enumerate(sorted(targets, reverse=True)):
        try:
            found.append(asdict(_analyze_target(config, cells, searches, target, number)))
        except StudyError as error:
            notes.append(f"Loss {target:g}: {error}.")
    return {
        "baseline": config.baseline,
        "chosen": config.targets is None,
        "targets": found,
        "searches": [
            {"name": f"{variant}, batch {batch:,}", "variant": variant, **search.tree()}
            for (variant, batch), search in searches.items()
        ],
        "notes": notes,
    }


def _analyze_target(
    config: BatchConfig,
    curves: Mapping[Key, Curves],
    searches: Mapping[Key, VariantSearch],
    target: float,
    number: int,
) -> TargetAnalysis:
    cells = {
        (variant, batch): measure_cell((variant, batch), curves.get((variant, batch), {}), target)
        for variant in config.variants
        for batch in config.batches
    }
    reached = {key: cell.log_tokens for key, cell in cells.items() if cell.state == "reached"}
    blocks = fit_blocks(reached) if reached else None
    freedom = blocks.freedom if blocks else 0
    laws: dict[str, VariantLaws] = {}
    variants = []
    for place, name in enumerate(config.variants):
        places = [
            _analyze_cell(cells[name, batch], searches.get((name, batch)), blocks)
            for batch in config.batches
        ]
        steps = steps_to_loss([asdict(p) for p in places], freedom)
        law = laws[name] = fit_variant_laws(steps, (number, place))
        variants.append(BatchVariant(name, places, law.mccandlish, law.regimes, law.optimal))
    tuned = {v.name: all(place.tuned for place in v.places) for v in variants}
    base = config.baseline
    ratios = [
        measure_token_ratio(cells, blocks, laws, (base, name), tuned=tuned[base] and tuned[name])
        for name in config.others
    ]
    sigma = blocks.sigma if blocks else math.nan
    return TargetAnalysis(target, sigma, freedom, variants, ratios)


def _analyze_cell(
    cell: Cell, search: VariantSearch | None, blocks: Blocks[Key] | None
) -> BatchPlace:
    """Return a cell with mean and interval; blocks are of all cells that reached the target."""
    key = (cell.variant, cell.batch)
    mean = error = half = math.nan
    if blocks is not None and key in blocks.groups:
        place = blocks.groups.index(key)
        mean = blocks.mean(key)
        error = blocks.sigma * math.sqrt(blocks.covariance[place, place])
        half = student_quantile(blocks.freedom) * error
    return BatchPlace(
        batch=cell.batch,
        state=cell.state,
        bound=cell.bound,
        values=None if search is None else search.best,
        tuned=search is not None and search.tuned,
        edges=[] if search is None else search.edges,
        log_tokens=mean,
        error=error,
        tokens=math.exp(mean),
        low=math.exp(mean - half),
        high=math.exp(mean + half),
    )


def steps_to_loss(places: list[dict[str, Any]], freedom: int) -> StepsToLoss:
    """Return S(B) from the batch, log_tokens and error of places, NaN or None where not reached."""
    sizes, log_tokens, error = (
        np.array([math.nan if p[key] is None else p[key] for p in places], np.float64)
        for key in ("batch", "log_tokens", "error")
    )
    log_steps = log_tokens - np.log(sizes)
    return StepsToLoss(
        batches=sizes,
        log_steps=np.where(np.isnan(log_steps), np.inf, log_steps),
        error=error,
        freedom=freedom,
    )


def read_steps(found: Mapping[str, Any]) -> Steps:
    """Return steps to each target by batch size, from the findings or result.json of a study.

    Raises:
        StudyError: if these are not the findings of a batch study.
    """
    if "baseline" not in found or "targets" not in found:
        raise StudyError(
            f"findings with the keys {shown(sorted(found))} are not those of a batch study, which "
            "have baseline and targets"
        )
    return {
        float(target["target"]): {
            variant["name"]: steps_to_loss(variant["places"], target["freedom"])
            for variant in target["variants"]
        }
        for target in found["targets"]
    }
