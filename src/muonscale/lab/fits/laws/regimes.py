"""Three regimes: tokens to a loss are constant up to a critical batch size B* and grow beyond it.

Practical Efficiency of Muon, arXiv 2505.02222, appendix F:

    log S = -log B + b1         for B <= B*
    log S = m log B + b2        beyond, -1 < m < 0,

continuous at B*, so that `b2 = b1 - (1 + m) log B*`. Of two optimizers the ratio of tokens then has three
regimes: below both critical batch sizes, between them, and beyond both.

For a given B* the law is linear in b1 and m. Between two measured batch sizes the best B* is where two
straight lines meet, or one of the two batch sizes: all are tried, so that the least squares are the least.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from muonscale.lab.fits.bootstrap import (
    LEVEL,
    Draws,
    Seed,
    noise_tables,
    residual_tables,
)
from muonscale.lab.fits.checks import distinct, enough, positive
from muonscale.lab.fits.result import ROUNDING, FloatArray, Prediction, Residuals, Span
from muonscale.lab.fits.status import FitStatus

NAME = "S = e^b1/B up to B*, e^b2 B^m beyond"
LEAST_SIZES = 4


@dataclass(frozen=True, kw_only=True)
class RegimeLaw:
    """The law, and what it was fitted to."""

    theta: FloatArray
    """b1 (the log of the tokens up to B*), m, log B*"""
    status: FitStatus
    remark: str
    """What these points do not tell; empty if they tell all."""
    residuals: Residuals
    batches: Span

    @property
    def critical(self) -> Prediction:
        """The critical batch size B*. Where it lies outside the measured sizes it is an end of them."""
        value = float(np.exp(self.theta[2]))
        ends = np.exp(log_critical(self.theta, self.batches))
        return Prediction(value, not 0 < ends < np.inf)

    def __call__(self, batch: ArrayLike) -> FloatArray:
        """Return the steps at B, elementwise."""
        return np.exp(log_steps(self.theta, np.log(np.asarray(batch, np.float64))))


def fit_regimes(batch: ArrayLike, steps: ArrayLike) -> RegimeLaw:
    """Fit the law to runs that reached one loss, by least squares of log S.

    Args:
        batch: B of each run, `[n]`, in tokens.
        steps: steps that it took to the loss.

    Raises:
        StudyError: for values that are not positive and finite, or fewer than four batch sizes.
    """
    batches, counts = positive(batch=batch, steps=steps)
    enough(NAME, "different batch sizes", distinct(batches), LEAST_SIZES)
    log_b = np.log(batches)
    theta = _search(log_b, (np.log(counts) + log_b)[None])[0]
    remark = _remark(theta, log_b)
    return RegimeLaw(
        theta=theta,
        status=FitStatus.BOUND_HIT if remark else FitStatus.CONVERGED,
        remark=remark,
        residuals=Residuals.of(np.log(counts) - log_steps(theta, log_b), len(theta)),
        batches=Span.of(batches),
    )


def draw_regimes(
    law: RegimeLaw,
    batch: ArrayLike,
    steps: ArrayLike,
    resamples: int = 1000,
    seed: Seed = 0,
    level: float = LEVEL,
    noise: float | None = None,
) -> Draws:
    """Refit the law to tables that might have been measured instead.

    Args:
        law: the fit to these runs.
        batch: B of each run.
        steps: steps of each run.
        resamples: number of tables.
        seed: of the draw; several numbers for one of several laws that are compared.
        level: of the intervals.
        noise: standard deviation of log S over seeds, when it is known from elsewhere; else the
            residuals are drawn anew, which takes five points.

    Raises:
        StudyError: for too few points or resamples for an interval.
    """
    batches, counts = positive(batch=batch, steps=steps)
    log_b, log_s = np.log(batches), np.log(counts)
    fitted, generator = log_steps(law.theta, log_b), np.random.default_rng(seed)
    if noise is None:
        jacobian = _jacobian(law.theta, log_b)
        tables = residual_tables(fitted, log_s - fitted, jacobian, resamples, generator, level)
    else:
        tables = noise_tables(fitted, noise, resamples, generator)
    return Draws(law.theta, _search(log_b, tables + log_b), level)


def log_steps(theta: FloatArray, log_b: float | FloatArray) -> FloatArray:
    """Return log S of laws `[..., 3]`: `[...]` at one batch, `[..., k]` at k."""
    b1, m, critical = theta[..., 0], theta[..., 1], theta[..., 2]
    if np.ndim(log_b):
        b1, m, critical = b1[..., None], m[..., None], critical[..., None]
    return b1 - log_b + (1 + m) * np.maximum(0, log_b - critical)


def log_critical(theta: FloatArray, measured: Span) -> FloatArray:
    """Return log B* of laws `[..., 3]`; infinite, of either sign, where it lies outside `measured`."""
    low = theta[..., 2] <= np.log(measured.low) + ROUNDING
    flat = theta[..., 1] <= -1 + ROUNDING
    return np.where(flat, np.inf, np.where(low, -np.inf, theta[..., 2]))


def log_ratio(theta: FloatArray, log_b: float | FloatArray) -> FloatArray:
    """Return log R of two laws `[..., 6]`, the baseline's parameters first."""
    return log_steps(theta[..., :3], log_b) - log_steps(theta[..., 3:], log_b)


def ratio_exponents(theta: FloatArray) -> FloatArray:
    """Return the exponents of B in R below both B*, between them and beyond, `[..., 3]`.

    Between them it is mA + 1 where the baseline's B* is the smaller one, else -(mM + 1).

    Args:
        theta: two laws `[..., 6]`, the baseline's parameters first.
    """
    m_a, m_m = theta[..., 1], theta[..., 4]
    between = np.where(theta[..., 2] <= theta[..., 5], m_a + 1, -(m_m + 1))
    return np.stack([np.zeros_like(m_a), between, m_a - m_m], axis=-1)


def _jacobian(theta: FloatArray, log_b: FloatArray) -> FloatArray:
    beyond = np.maximum(0, log_b - theta[2])
    return np.stack([np.ones_like(log_b), beyond, -(1 + theta[1]) * (beyond > 0)], axis=1)


def _search(log_b: FloatArray, log_tokens: FloatArray) -> FloatArray:
    """Return the parameters of the least squares of each table.

    Args:
        log_b: `[n]`
        log_tokens: log T, `[r, n]`.

    Returns:
        b1, m, log B*: `[r, 3]`. Where tokens do not grow, B* is the largest batch size.
    """
    places = np.unique(log_b)
    found = [_bent_at(place, log_b, log_tokens) for place in places[:-1]]
    for low, high in itertools.pairwise(places):
        found += _bent_between(low, high, log_b, log_tokens)
    candidates = np.stack(found)  # [c, r, 3]: log tokens below, slope beyond, log B*
    bent = np.maximum(0, log_b - candidates[..., 2:])
    missed = log_tokens - candidates[..., :1] - candidates[..., 1:2] * bent
    squares = np.nan_to_num((missed**2).sum(-1), nan=np.inf)
    best = np.take_along_axis(candidates, squares.argmin(0)[None, :, None], axis=0)[0]
    flat = best[:, 1] <= 0
    critical = np.where(flat, places[-1], best[:, 2])
    return np.stack([best[:, 0], best[:, 1] - 1, critical], axis=1)


def _bent_at(place: float, log_b: FloatArray, log_tokens: FloatArray) -> FloatArray:
    """Return the best law with B* at a place: `[r, 3]`. Its slope is kept between 0 and 1."""
    beyond = np.maximum(0, log_b - place)
    centred = beyond - beyond.mean()
    slope = np.clip(log_tokens @ centred / (centred @ centred), 0, 1)
    least = log_tokens.mean(1) - slope * beyond.mean()
    return np.stack([least, slope, np.full_like(least, place)], axis=1)


def _bent_between(
    low: float, high: float, log_b: FloatArray, log_tokens: FloatArray
) -> list[FloatArray]:
    """Return the laws whose two lines meet between two places, NaN where they do not: `[r, 3]` each.

    The line beyond has the slope of least squares, or 1, the most it may have.
    """
    left, right = log_b <= low, log_b >= high
    least, after, x = log_tokens[:, left].mean(1), log_tokens[:, right], log_b[right]
    slopes = [np.ones_like(least)]
    if len(np.unique(x)) > 1:
        slopes.append(after @ (x - x.mean()) / np.sum((x - x.mean()) ** 2))
    found = []
    for slope in slopes:
        with np.errstate(divide="ignore", invalid="ignore"):
            place = (least - after.mean(1)) / slope + x.mean()
        inside = (place >= low) & (place <= high) & (slope > 0) & (slope <= 1)
        law = np.stack([least, slope, place], axis=1)
        found.append(np.where(inside[:, None], law, np.nan))
    return found


def _remark(theta: FloatArray, log_b: FloatArray) -> str:
    if theta[1] <= -1 + ROUNDING:
        return "tokens do not grow with the batch: B* lies beyond the batch sizes measured"
    if theta[2] <= log_b.min() + ROUNDING:
        return "tokens grow from the smallest batch on: B* lies below the batch sizes measured"
    if distinct(np.exp(log_b[log_b > theta[2] + ROUNDING])) < 2:
        return "one batch size lies beyond B*: where tokens begin to grow and how fast is not told apart"
    if theta[1] >= -ROUNDING:
        return "beyond B* steps do not fall at all: m is at the end of its range"
    return ""
