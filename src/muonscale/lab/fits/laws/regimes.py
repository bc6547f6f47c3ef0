"""Three regimes: tokens to a loss are constant up to a critical batch size B* and grow beyond it.

Practical Efficiency of Muon, arXiv 2505.02222, appendix F:

    log S = -log B + b1         for B <= B*
    log S = m log B + b2        beyond, -1 < m < 0,

continuous at B*, so that `b2 = b1 - (1 + m) log B*`. The ratio of the tokens of two optimizers then
has three regimes: below both critical batch sizes, between them, and beyond both.

For a given B* the law is linear in b1 and m. Between two measured batch sizes the best B* is either
where two straight lines meet or one of the two batch sizes. The fit tries all of these, so that it
finds the least squares of all laws.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from muonscale.lab.fits.bootstrap import Draws
from muonscale.lab.fits.findings import FitEstimate, estimate_quantity
from muonscale.lab.fits.laws.base import Parameter, StepsLaw
from muonscale.lab.fits.minimize import Model
from muonscale.lab.fits.result import (
    ROUNDING,
    FitStatus,
    FloatArray,
    Prediction,
    SizeRange,
    check_count,
    check_positive,
    count_distinct,
)

LEAST_SIZES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class RegimeLaw(StepsLaw):
    """The law `S = e^b1/B` up to B*, and `S = e^b2 B^m` beyond."""

    NAME = "regimes"
    FORMULA = "S = e^b1/B up to B*, e^b2 B^m beyond"
    NOTE = "B* and tokens are in the unit of the column of batch sizes."
    PARAMETERS = (
        Parameter("tokens", "tokens up to B*"),
        Parameter("exponent", "m", log=False),
        Parameter("critical_batch", "B*"),
    )

    tokens: float
    """e^b1: the tokens to the loss up to B*."""
    exponent: float
    """m"""
    critical_batch: float
    """B*"""

    @classmethod
    def fit(cls, batch: ArrayLike, steps: ArrayLike) -> Self:
        """Fit the law to runs that reached one loss, by least squares of log S.

        Args:
            batch: B of each run, `[n]`, in tokens.
            steps: steps of each run to the loss.

        Raises:
            StudyError: for values that are not positive and finite, or fewer than four batch sizes.
        """
        batches, counts = check_positive(batch=batch, steps=steps)
        check_count(cls.FORMULA, "different batch sizes", count_distinct(batches), LEAST_SIZES)
        log_b = np.log(batches)
        theta = _search(log_b, (np.log(counts) + log_b)[None])[0]
        remark = _describe_undetermined(theta, log_b)
        status = FitStatus.BOUND_HIT if remark else FitStatus.CONVERGED
        return cls.from_theta(theta, status, (batches,), counts)

    @staticmethod
    def log_model(log_b: FloatArray) -> Model:
        """Return the log steps at B, and their Jacobian, by b1, m and log B*."""

        def model(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
            beyond = np.maximum(0, log_b - theta[2])
            columns = [np.ones_like(log_b), beyond, -(1 + theta[1]) * (beyond > 0)]
            return log_steps(theta, log_b), np.stack(columns, axis=1)

        return model

    @property
    def remark(self) -> str:
        """What the points do not determine; empty if they determine all parameters."""
        return _describe_undetermined(self.theta, np.log(self.x[0]))

    @property
    def critical(self) -> Prediction:
        """The critical batch size B*. It is an end of the measured sizes if it is outside them."""
        inside = np.isfinite(log_critical(self.theta, self.ranges[0]))
        return Prediction(self.critical_batch, not inside)

    def __call__(self, batch: ArrayLike) -> FloatArray:
        """Return the steps at B, elementwise."""
        return np.exp(log_steps(self.theta, np.log(np.asarray(batch, np.float64))))

    def refit(self, tables: FloatArray, counts: FloatArray) -> tuple[FloatArray, int]:
        """Fit the law to other steps of the same runs."""
        log_b = np.log(self.x[0])
        return _search(log_b, tables + log_b), 0

    @staticmethod
    def log_value(theta: FloatArray, at: float) -> FloatArray:
        """Return log S of laws `[..., 3]` at B."""
        return log_steps(theta, np.log(at))

    def estimates(self, draws: Draws, at: Sequence[float] = ()) -> tuple[FitEstimate, ...]:
        """Return B*, the tokens up to it, and m."""
        measured = self.ranges[0]
        critical = estimate_quantity(
            "B*", draws, lambda theta: log_critical(theta, measured), log=True
        )
        critical = replace(
            critical, value=self.critical.value, extrapolated=self.critical.extrapolated
        )
        return (critical, *self.estimate_parameters(draws)[:2])


def log_steps(theta: FloatArray, log_b: float | FloatArray) -> FloatArray:
    """Return log S of laws `[..., 3]`: `[...]` at one batch, `[..., k]` at k."""
    b1, m, critical = theta[..., 0], theta[..., 1], theta[..., 2]
    if np.ndim(log_b):
        b1, m, critical = b1[..., None], m[..., None], critical[..., None]
    return b1 - log_b + (1 + m) * np.maximum(0, log_b - critical)


def log_critical(theta: FloatArray, measured: SizeRange) -> FloatArray:
    """Return log B* of laws `[..., 3]`; plus or minus infinity if it is outside `measured`."""
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


def _search(log_b: FloatArray, log_tokens: FloatArray) -> FloatArray:
    """Return the parameters of the least squares of each table.

    Args:
        log_b: `[n]`
        log_tokens: log T, `[r, n]`.

    Returns:
        b1, m, log B*: `[r, 3]`. Where tokens do not grow, B* is the largest batch size.
    """
    places = np.unique(log_b)
    candidates = []  # [r, 3] each: log tokens below, slope beyond, log B*

    # B* at a batch size; the slope is kept between 0 and 1.
    for place in places[:-1]:
        beyond = np.maximum(0, log_b - place)
        centered = beyond - beyond.mean()
        slope = np.clip(log_tokens @ centered / (centered @ centered), 0, 1)
        least = log_tokens.mean(1) - slope * beyond.mean()
        candidates.append(np.stack([least, slope, np.full_like(least, place)], axis=1))

    # B* between two batch sizes, where two lines meet; NaN where they do not. The line beyond has
    # the slope of least squares, or 1, the largest that is allowed.
    for low, high in itertools.pairwise(places):
        left, right = log_b <= low, log_b >= high
        least, after, x = log_tokens[:, left].mean(1), log_tokens[:, right], log_b[right]
        slopes = [np.ones_like(least)]
        if len(np.unique(x)) > 1:
            slopes.append(after @ (x - x.mean()) / np.sum((x - x.mean()) ** 2))
        for slope in slopes:
            with np.errstate(divide="ignore", invalid="ignore"):
                place = (least - after.mean(1)) / slope + x.mean()
            inside = (place >= low) & (place <= high) & (slope > 0) & (slope <= 1)
            law = np.stack([least, slope, place], axis=1)
            candidates.append(np.where(inside[:, None], law, np.nan))

    laws = np.stack(candidates)  # [c, r, 3]
    bent = np.maximum(0, log_b - laws[..., 2:])
    missed = log_tokens - laws[..., :1] - laws[..., 1:2] * bent
    squares = np.nan_to_num((missed**2).sum(-1), nan=np.inf)
    best = np.take_along_axis(laws, squares.argmin(0)[None, :, None], axis=0)[0]
    critical = np.where(best[:, 1] <= 0, places[-1], best[:, 2])
    return np.stack([best[:, 0], best[:, 1] - 1, critical], axis=1)


def _describe_undetermined(theta: FloatArray, log_b: FloatArray) -> str:
    """Return what the points do not determine; empty if they determine all parameters."""
    if theta[1] <= -1 + ROUNDING:
        return "tokens do not grow with the batch: B* is above the batch sizes measured"
    if theta[2] <= log_b.min() + ROUNDING:
        return "tokens grow from the smallest batch on: B* is below the batch sizes measured"
    if count_distinct(np.exp(log_b[log_b > theta[2] + ROUNDING])) < 2:
        return "only one batch size is above B*: B* and the growth beyond it are not determined"
    if theta[1] >= -ROUNDING:
        return "beyond B* steps do not fall at all: m is at the end of its range"
    return ""
