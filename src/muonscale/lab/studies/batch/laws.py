"""Critical batch sizes of one optimizer to one loss, by three definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import f

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import CONFIDENCE, Draws, Seed, stretch
from muonscale.lab.fits.findings import (
    FitCurve,
    FitEstimate,
    estimate_quantity,
    format_significant,
    trace_curve,
)
from muonscale.lab.fits.laws.base import StepsLaw
from muonscale.lab.fits.laws.batch import OVERHEAD, BatchLaw
from muonscale.lab.fits.laws.regimes import RegimeLaw
from muonscale.lab.fits.result import ROUNDING, Residuals
from muonscale.lab.fits.rising import SIGNIFICANT
from muonscale.lab.fits.steps_to_loss import StepsToLoss
from muonscale.lab.fits.token_optimal import draw_token_optimal, find_token_optimal

POINTS = 40
"""Points of a law's curve."""
RESAMPLES = 1000
TOLERANCE = OVERHEAD
"""Tolerance of the tolerant token-optimal batch: the extra data of the overhead batch."""


@dataclass(frozen=True, kw_only=True)
class CriticalBatch:
    """A critical batch size by one definition, with its law."""

    name: str
    estimates: tuple[FitEstimate, ...] = ()
    """An end of an interval outside the measured batch sizes is infinite, or 0."""
    status: str = ""
    remark: str = ""
    rms: float = math.nan
    """Root mean square of the residuals of log S."""
    curve: FitCurve | None = None
    """Steps by batch size according to the law."""
    without_intervals: str = ""
    """Why there are no intervals."""
    refused: str = ""
    """Why there is no law; then all else is empty."""


@dataclass(frozen=True, kw_only=True)
class VariantLaws:
    """The critical batch sizes of one variant, with the draws to compare two variants."""

    mccandlish: CriticalBatch
    regimes: CriticalBatch
    optimal: CriticalBatch
    regime_draws: Draws | None = field(default=None, compare=False)
    optimal_draws: Draws | None = field(default=None, compare=False)


def fit_variant_laws(steps: StepsToLoss, seed: tuple[int, ...]) -> VariantLaws:
    """Fit the laws to measured steps.

    Args:
        steps: S(B).
        seed: seed of the draws, different for variants that are compared.
    """
    mccandlish, _ = _fit_law(BatchLaw, steps, (*seed, 0))
    regimes, regime_draws = _fit_law(RegimeLaw, steps, (*seed, 1))
    optimal, optimal_draws = _find_optimal(steps, (*seed, 2))
    return VariantLaws(
        mccandlish=mccandlish,
        regimes=regimes,
        optimal=optimal,
        regime_draws=regime_draws,
        optimal_draws=optimal_draws,
    )


def _fit_law(
    law_type: type[StepsLaw], steps: StepsToLoss, seed: Seed
) -> tuple[CriticalBatch, Draws | None]:
    kept = steps.reached
    batches, counts = steps.batches[kept], np.exp(steps.log_steps[kept])
    noise = None
    if steps.freedom:  # stretched, because the noise is an estimate itself
        mean_error = float(np.sqrt(np.mean(steps.error[kept] ** 2))) if kept.any() else 0.0
        noise = mean_error * stretch(CONFIDENCE, steps.freedom)
    try:
        law = law_type.fit(batches, counts)
    except StudyError as error:
        return CriticalBatch(name=law_type.FORMULA, refused=str(error)), None
    draws, why = Draws.none(law.theta), ""
    try:
        draws = law.draw(RESAMPLES, seed, noise=noise)
    except StudyError as error:
        why = str(error)
    grid = np.geomspace(batches[0], batches[-1], POINTS)
    found = CriticalBatch(
        name=law.FORMULA,
        estimates=law.estimates(draws),
        status=law.status.value,
        remark="; ".join(filter(None, (law.remark, _describe_misfit(steps, law.residuals)))),
        rms=law.residuals.rms,
        curve=trace_curve(
            draws, grid, lambda theta: np.stack([law.log_value(theta, b) for b in grid], axis=-1)
        ),
        without_intervals=why,
    )
    return found, draws


def _describe_misfit(steps: StepsToLoss, residuals: Residuals) -> str:
    """Return a remark if a law misses by more than the noise of seeds explains (F test, 5 %)."""
    noise = float(np.sqrt(np.mean(steps.error[steps.reached] ** 2)))
    if not steps.freedom or not residuals.degrees or residuals.rms <= ROUNDING:
        return ""
    ratio = (residuals.rms / noise) ** 2 if noise else math.inf
    if f.sf(ratio, residuals.degrees, steps.freedom) >= SIGNIFICANT:
        return ""
    return (
        f"the law misses by {residuals.rms:.1%} and seeds explain {noise:.1%}: its intervals "
        "include the noise of seeds alone and are too narrow"
    )


def _find_optimal(steps: StepsToLoss, seed: Seed) -> tuple[CriticalBatch, Draws | None]:
    """Return the largest batch with the fewest tokens, and the largest within a tolerance."""
    name = "max{B: T(B) = min T}"
    kept = steps.batches[steps.reached]
    if len(kept) < 2:
        why = "the loss was reached at fewer than two batch sizes"
        return CriticalBatch(name=name, refused=why), None
    draws, why = [], ""
    for tolerance in (0.0, TOLERANCE):
        try:
            draws.append(draw_token_optimal(steps, tolerance, RESAMPLES, seed))
        except StudyError as error:
            why = str(error)
            least = find_token_optimal(steps.batches, steps.log_tokens, tolerance)
            draws.append(Draws.none(np.atleast_1d(least)))
    names = ("token-optimal batch", f"largest batch within {TOLERANCE:.0%} of the fewest tokens")
    found = tuple(
        estimate_quantity(title, each, lambda theta: theta[..., 0])
        for title, each in zip(names, draws, strict=True)
    )
    value, remark = found[0].value, ""
    if value in (kept[0], kept[-1]):
        which = "smallest" if value == kept[0] else "largest"
        remark = (
            f"{format_significant(value)} is the {which} batch that reached the loss; the optimum "
            "may be beyond it"
        )
    law = CriticalBatch(name=name, estimates=found, remark=remark, without_intervals=why)
    return law, draws[0]
