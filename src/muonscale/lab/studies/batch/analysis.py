"""What a batch study finds, and its steps to a loss as other analyses read them from result.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import t as student

from muonscale.errors import StudyError, shown
from muonscale.lab.fits.bootstrap import LEVEL
from muonscale.lab.fits.steps_to_loss import StepsToLoss
from muonscale.lab.studies.analysis.seed_blocks import fit_blocks
from muonscale.lab.studies.batch.laws import Law, Laws, laws_of
from muonscale.lab.studies.batch.measurements import (
    Cell,
    Key,
    Rates,
    Spent,
    cell_of,
    choose_targets,
    read_cells,
    spent_of,
)
from muonscale.lab.studies.batch.ratio import Ratio, ratio_of
from muonscale.lab.studies.study import Outcomes

if TYPE_CHECKING:
    from muonscale.lab.studies.batch.study import BatchConfig

Steps = dict[float, dict[str, StepsToLoss]]
"""By target loss and variant."""

BY_LENGTH = (
    "The learning rate at a step depends on how long the run was going to be, and runs of large batches may "
    "be longer: losses read on the way are not those of a run that ends there. Give a constant learning "
    "rate, and the warm-up as a number of steps."
)
SAMPLED = (
    "On the way losses were read on a part of the held-out split, and at the end on all of it: give "
    "eval.tokens at least its size."
)


@dataclass(frozen=True)
class Place:
    """One variant at one batch size."""

    batch: int
    state: str
    """`reached`, `>`, `<` or `missing`, see `batch_cells.Cell`."""
    bound: float
    lr: float | None
    edge: str | None
    log_tokens: float
    """Mean of log T over seeds; NaN where it was not reached."""
    error: float
    """Standard error of that, the luck of the seed not included; NaN without noise."""
    tokens: float
    low: float
    high: float
    """T and the ends of its 90 % interval."""
    rates: list[dict[str, object]]


@dataclass(frozen=True)
class Variant:
    """One variant on its way to one target."""

    name: str
    places: list[Place]
    mccandlish: Law
    regimes: Law
    optimal: Law


@dataclass(frozen=True)
class Target:
    """What was found of one loss."""

    target: float
    sigma: float
    """Noise of log T, seed effects taken out."""
    freedom: int
    variants: list[Variant]
    ratios: list[Ratio]


def found_of(config: BatchConfig, outcomes: Outcomes, *, by_length: bool) -> dict[str, Any]:
    """Return what was found of all targets, as plain values.

    Args:
        config: of the study.
        outcomes: of its runs.
        by_length: whether the learning rate of the runs depends on their length.
    """
    cells = read_cells(outcomes)
    chosen = config.targets is None
    targets = choose_targets(cells) if config.targets is None else config.targets
    notes = [BY_LENGTH] if by_length else []
    notes += [SAMPLED] if _sampled(outcomes) else []
    found = []
    for number, target in enumerate(sorted(targets, reverse=True)):
        try:
            found.append(asdict(_target(config, cells, target, number)))
        except StudyError as error:
            notes.append(f"Loss {target:g}: {error}.")
    return {
        "baseline": config.baseline,
        "reference_batch": config.reference,
        "chosen": chosen,
        "targets": found,
        "notes": notes,
    }


def _sampled(outcomes: Outcomes) -> bool:
    """Return whether a run was evaluated on other parts of the held-out split on the way."""
    for outcome in outcomes.values():
        if outcome.result is not None:
            records = [r for r in outcome.folder.read_metrics() if r["kind"] == "eval"]
            return len({r.get("held_out_tokens") for r in records}) > 1
    return False


def _target(config: BatchConfig, read: Mapping[Key, Rates], target: float, number: int) -> Target:
    cells = {
        (variant, batch): cell_of((variant, batch), read.get((variant, batch), {}), target)
        for variant in config.variants
        for batch in config.batches
    }
    reached = {key: cell.log_tokens for key, cell in cells.items() if cell.state == "reached"}
    blocks = fit_blocks(reached) if reached else None
    spent = {
        name: [spent_of(cells[name, batch], blocks) for batch in config.batches]
        for name in config.variants
    }
    freedom = blocks.freedom if blocks else 0
    laws = {
        name: laws_of(_steps(each, freedom), (number, place))
        for place, (name, each) in enumerate(spent.items())
    }
    return Target(
        target=target,
        sigma=blocks.sigma if blocks else math.nan,
        freedom=freedom,
        variants=[_variant(name, spent[name], laws[name], freedom) for name in config.variants],
        ratios=[ratio_of(cells, blocks, laws, (config.baseline, name)) for name in config.others],
    )


def _steps(spent: list[Spent], freedom: int) -> StepsToLoss:
    return steps_to_loss(
        [each.cell.batch for each in spent],
        [each.log_tokens for each in spent],
        [each.error for each in spent],
        freedom,
    )


def steps_to_loss(
    batches: list[int], log_tokens: list[float], errors: list[float], freedom: int
) -> StepsToLoss:
    """Return S(B) from the log of tokens at every batch size, NaN where a loss was not reached."""
    sizes = np.array(batches, np.float64)
    log_steps = np.array(log_tokens, np.float64) - np.log(sizes)
    return StepsToLoss(
        batches=sizes,
        log_steps=np.where(np.isnan(log_steps), np.inf, log_steps),
        error=np.array(errors, np.float64),
        freedom=freedom,
    )


def _variant(name: str, spent: list[Spent], laws: Laws, freedom: int) -> Variant:
    places = [_place(each, freedom) for each in spent]
    return Variant(name, places, laws.mccandlish, laws.regimes, laws.optimal)


def _place(spent: Spent, freedom: int) -> Place:
    cell: Cell = spent.cell
    half = float(student.ppf((1 + LEVEL) / 2, freedom)) * spent.error if freedom else math.nan
    ends = (spent.log_tokens, spent.log_tokens - half, spent.log_tokens + half)
    tokens, low, high = (math.exp(end) for end in ends)
    return Place(
        batch=cell.batch,
        state=cell.state,
        bound=cell.bound,
        lr=cell.lr,
        edge=cell.edge,
        log_tokens=spent.log_tokens,
        error=spent.error,
        tokens=tokens,
        low=low,
        high=high,
        rates=cell.rates,
    )


def steps_of(found: Mapping[str, Any]) -> Steps:
    """Return steps to each target by batch size, of what a batch study found.

    Args:
        found: what `Batch.analyse` returns, or the study's result.json.

    Raises:
        StudyError: if these are not the findings of a batch study.
    """
    if "baseline" not in found or "targets" not in found:
        raise StudyError(
            f"findings with the keys {shown(sorted(found))} are not of a batch study, which must have "
            "baseline and targets"
        )
    return {
        float(target["target"]): {
            variant["name"]: steps_to_loss(
                [place["batch"] for place in variant["places"]],
                [_nan(place["log_tokens"]) for place in variant["places"]],
                [_nan(place["error"]) for place in variant["places"]],
                target["freedom"],
            )
            for variant in target["variants"]
        }
        for target in found["targets"]
    }


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
