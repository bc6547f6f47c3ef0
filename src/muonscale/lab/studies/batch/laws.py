"""Critical batch sizes of one optimizer to one loss, by three definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import f

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import LEVEL, Draws, Seed, stretch
from muonscale.lab.fits.findings import (
    FitCurve,
    FitEstimate,
    estimate,
    format_significant,
    trace_curve,
)
from muonscale.lab.fits.laws.base import StepsLaw
from muonscale.lab.fits.laws.batch import OVERHEAD, BatchLaw
from muonscale.lab.fits.laws.regimes import RegimeLaw
from muonscale.lab.fits.result import ROUNDING, FloatArray, Residuals
from muonscale.lab.fits.rising import SIGNIFICANT
from muonscale.lab.fits.steps_to_loss import StepsToLoss
from muonscale.lab.fits.token_optimal import draw_token_optimal, find_token_optimal

POINTS = 40
"""Of a law's curve."""
RESAMPLES = 1000
TOLERANCE = OVERHEAD
"""Of the tolerant token-optimal batch: as much data as the overhead batch takes more."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """One definition of a critical batch size, and what it gives."""

    name: str
    estimates: tuple[FitEstimate, ...] = ()
    """Ends of intervals are infinite, or 0, where they lie outside the measured batch sizes."""
    status: str = ""
    remark: str = ""
    rms: float = math.nan
    """Of the residuals of log S."""
    curve: FitCurve | None = None
    """log S by the law, as steps by batch size."""
    without_intervals: str = ""
    refused: str = ""
    """Why there is none; then all else is empty."""


@dataclass(frozen=True, kw_only=True)
class Laws:
    """Those of one variant, with what is needed to compare two."""

    mccandlish: Law
    regimes: Law
    optimal: Law
    regime_draws: Draws | None = field(default=None, compare=False)
    optimal_draws: Draws | None = field(default=None, compare=False)


def laws_of(steps: StepsToLoss, seed: tuple[int, ...]) -> Laws:
    """Return the laws of what was measured.

    Args:
        steps: S(B).
        seed: of the draws; different ones for variants that are compared.
    """
    mccandlish, _ = _fit(BatchLaw, steps, (*seed, 0))
    regimes, regime_draws = _fit(RegimeLaw, steps, (*seed, 1))
    optimal, optimal_draws = _optimal(steps, (*seed, 2))
    return Laws(
        mccandlish=mccandlish,
        regimes=regimes,
        optimal=optimal,
        regime_draws=regime_draws,
        optimal_draws=optimal_draws,
    )


def _points(steps: StepsToLoss) -> tuple[FloatArray, FloatArray, float | None]:
    """Return batch sizes, steps and the noise of a log step, stretched as it was estimated itself."""
    kept = steps.reached
    noise = None
    if steps.freedom:
        error = float(np.sqrt(np.mean(steps.error[kept] ** 2))) if kept.any() else 0.0
        noise = error * stretch(LEVEL, steps.freedom)
    return steps.batches[kept], np.exp(steps.log_steps[kept]), noise


def _misfit(steps: StepsToLoss, residuals: Residuals) -> str:
    """Return a remark if a law misses by more than the noise of seeds explains (F test, 5 %)."""
    noise = float(np.sqrt(np.mean(steps.error[steps.reached] ** 2)))
    if not steps.freedom or not residuals.degrees or residuals.rms <= ROUNDING:
        return ""
    ratio = (residuals.rms / noise) ** 2 if noise else math.inf
    if f.sf(ratio, residuals.degrees, steps.freedom) >= SIGNIFICANT:
        return ""
    return (
        f"the law misses by {residuals.rms:.1%} and seeds explain {noise:.1%}: its intervals, which know "
        "of seeds alone, are too narrow"
    )


def _joined(*remarks: str) -> str:
    return "; ".join(remark for remark in remarks if remark)


def _fit(law_type: type[StepsLaw], steps: StepsToLoss, seed: Seed) -> tuple[Law, Draws | None]:
    batches, counts, noise = _points(steps)
    try:
        law = law_type.fit(batches, counts)
    except StudyError as error:
        return Law(name=law_type.FORMULA, refused=str(error)), None
    draws, why = Draws.none(law.theta), ""
    try:
        draws = law.draw(RESAMPLES, seed, noise=noise)
    except StudyError as error:
        why = str(error)
    kept = steps.batches[steps.reached]
    grid = np.geomspace(kept[0], kept[-1], POINTS)
    found = Law(
        name=law.FORMULA,
        estimates=law.estimates(draws),
        status=law.status.value,
        remark=_joined(law.remark, _misfit(steps, law.residuals)),
        rms=law.residuals.rms,
        curve=trace_curve(
            draws, grid, lambda theta: np.stack([law.log_value(theta, b) for b in grid], axis=-1)
        ),
        without_intervals=why,
    )
    return found, draws


def _optimal(steps: StepsToLoss, seed: Seed) -> tuple[Law, Draws | None]:
    name = "max{B: T(B) = min T}"
    kept = steps.batches[steps.reached]
    if len(kept) < 2:
        return Law(name=name, refused="the loss was reached at fewer than two batch sizes"), None
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
        estimate(called, each, lambda theta: theta[..., 0])
        for called, each in zip(names, draws, strict=True)
    )
    return Law(
        name=name, estimates=found, remark=_at_end(found[0].value, kept), without_intervals=why
    ), draws[0]


def _at_end(value: float, kept: FloatArray) -> str:
    if value in (kept[0], kept[-1]):
        which = "smallest" if value == kept[0] else "largest"
        return f"{format_significant(value)} is the {which} batch that reached the loss: it may lie beyond"
    return ""
