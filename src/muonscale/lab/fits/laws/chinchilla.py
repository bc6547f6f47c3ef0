"""`L = E + A/N^alpha + B/D^beta`: loss by parameters N and training tokens D.

Hoffmann et al., arXiv 2203.15556, approach 3: Huber's loss of the differences of log losses, with
delta = 1e-3, summed over the points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import (
    LEVEL,
    Draws,
    Seed,
    check_degrees,
    noise_tables,
    pair_counts,
)
from muonscale.lab.fits.checks import distinct, enough, not_collinear, positive
from muonscale.lab.fits.huber import REFIT_GRADIENT, Model, polish, whitening
from muonscale.lab.fits.laws.separable import search
from muonscale.lab.fits.result import FloatArray, Prediction, Residuals, Span
from muonscale.lab.fits.status import FitStatus

NAME = "L = E + A/N^alpha + B/D^beta"
DELTA = 1e-3
LEAST_POINTS = 6
LEAST_SIZES = 3
EXPONENTS = (0.01, 3.0)
"""Beyond these an exponent is not told by the points."""
LEAST_SHARE = 1e-3
"""A term with a smaller part of the loss at every point is one that the points do not tell."""
NOTHING = 1e-9
"""A part of the loss that is rounding."""


@dataclass(frozen=True, kw_only=True)
class ChinchillaLaw:
    """The law, and what it was fitted to."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    status: FitStatus
    residuals: Residuals
    parameters: Span
    """Range of N."""
    tokens: Span
    """Range of D."""
    delta: float = DELTA

    @property
    def theta(self) -> FloatArray:
        """The parameters as the fit has them: log A, log B, log E, alpha, beta."""
        return np.array([*np.log([self.A, self.B, self.E]), self.alpha, self.beta])

    def __call__(self, parameters: ArrayLike, tokens: ArrayLike) -> FloatArray:
        """Return the loss at N and D, elementwise."""
        n, d = np.asarray(parameters, np.float64), np.asarray(tokens, np.float64)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def predict(self, parameters: float, tokens: float) -> Prediction:
        """Return the loss at N and D; extrapolated if either lies outside its range."""
        inside = self.parameters.holds(parameters) and self.tokens.holds(tokens)
        return Prediction(float(self(parameters, tokens)), not inside)


def fit_chinchilla(
    parameters: ArrayLike, tokens: ArrayLike, loss: ArrayLike, delta: float = DELTA
) -> ChinchillaLaw:
    """Fit the law to runs.

    Args:
        parameters: N of each run, `[n]`.
        tokens: D of each run, in training tokens.
        loss: loss of each run, in nats.
        delta: relative error at which a point's weight begins to fall.

    Raises:
        StudyError: for values that are not positive and finite, fewer than six settings or than
            three values of N or D, N and D that go together, or a loss that falls with neither.
    """
    n, d, losses = positive(parameters=parameters, tokens=tokens, loss=loss)
    _check(n, d)
    log_n, log_d, target = np.log(n), np.log(d), np.log(losses)
    model = log_law(log_n, log_d)
    start = _start(log_n, log_d, losses)
    theta, status = polish(model, start, target, np.ones_like(target), delta)
    predicted, jacobian = model(theta)
    log_a, log_b, log_e, alpha, beta = theta
    return ChinchillaLaw(
        A=float(np.exp(log_a)),
        B=float(np.exp(log_b)),
        E=float(np.exp(log_e)),
        alpha=float(alpha),
        beta=float(beta),
        status=_bounded(theta, jacobian[:, :3], status),
        residuals=Residuals.of(target - predicted, len(theta)),
        parameters=Span.of(n),
        tokens=Span.of(d),
        delta=delta,
    )


def draw_chinchilla(
    law: ChinchillaLaw,
    parameters: ArrayLike,
    tokens: ArrayLike,
    loss: ArrayLike,
    resamples: int = 1000,
    seed: Seed = 0,
    level: float = LEVEL,
    noise: float | None = None,
) -> Draws:
    """Refit the law to tables that might have been measured instead, each from `law`.

    Args:
        law: the fit to these runs.
        parameters: N of each run.
        tokens: D of each run.
        loss: loss of each run.
        resamples: number of tables.
        seed: of the draw; several numbers for one of several laws that are compared.
        level: of the intervals.
        noise: standard deviation of the log loss over seeds, when it is known from elsewhere; else
            the runs are drawn anew. (Drawing the residuals gives intervals that are too narrow: with
            a delta far below the noise the law goes through some of the points.)

    Raises:
        StudyError: for fewer than seven points, or too few resamples.
    """
    n, d, losses = positive(parameters=parameters, tokens=tokens, loss=loss)
    check_degrees(len(losses), len(law.theta))
    model, target = log_law(np.log(n), np.log(d)), np.log(losses)
    generator, ones = np.random.default_rng(seed), np.ones_like(target)
    if noise is None:
        counts = pair_counts(len(target), resamples, generator)
        tables = [(target, count) for count in counts]
    else:
        targets = noise_tables(model(law.theta)[0], noise, resamples, generator)
        tables = [(table, ones) for table in targets]
    basis = whitening(model, law.theta, law.delta)
    refits = [
        polish(model, law.theta, *table, law.delta, basis, REFIT_GRADIENT) for table in tables
    ]
    failed = sum(status is not FitStatus.CONVERGED for _, status in refits)
    return Draws(law.theta, np.stack([theta for theta, _ in refits]), level, failed)


def log_law(log_n: FloatArray, log_d: FloatArray) -> Model:
    """Return the log loss at these points, and its Jacobian, as a function of the parameters.

    The parameters are log A, log B, log E, alpha, beta.
    """

    def model(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        log_a, log_b, log_e, alpha, beta = theta
        terms = np.empty((3, len(log_n)))
        terms[0] = log_a - alpha * log_n
        terms[1] = log_b - beta * log_d
        terms[2] = log_e
        largest = terms.max(axis=0)
        shares = np.exp(terms - largest)
        total = shares.sum(axis=0)
        shares /= total
        jacobian = np.stack([*shares, -shares[0] * log_n, -shares[1] * log_d], axis=1)
        return largest + np.log(total), jacobian

    return model


def _check(n: FloatArray, d: FloatArray) -> None:
    settings = len({(round(a, 9), round(b, 9)) for a, b in zip(np.log(n), np.log(d), strict=True)})
    enough(NAME, "runs of different N or D", settings, LEAST_POINTS)
    enough(NAME, "different parameter counts N", distinct(n), LEAST_SIZES)
    enough(NAME, "different token counts D", distinct(d), LEAST_SIZES)
    not_collinear(n, d, ("N", "D"))


def _start(log_n: FloatArray, log_d: FloatArray, loss: FloatArray) -> FloatArray:
    middle_n, middle_d = log_n.mean(), log_d.mean()
    (alpha, beta), (e, a, b) = search([log_n - middle_n, log_d - middle_d], loss)
    for term, what in ((a, "parameters N"), (b, "tokens D")):
        if term <= NOTHING * loss.min():
            raise StudyError(
                f"the losses do not fall with {what}, so {NAME} has no such term here; "
                "runs over a wider range are needed, or `--law compute`"
            )
    e = max(e, LEAST_SHARE * loss.min())
    return np.array(
        [np.log(a) + alpha * middle_n, np.log(b) + beta * middle_d, np.log(e), alpha, beta]
    )


def _bounded(theta: FloatArray, shares: FloatArray, status: FitStatus) -> FitStatus:
    """Mark a fit in which an exponent left its range, or a term has next to no part of any loss."""
    inside = all(EXPONENTS[0] <= value <= EXPONENTS[1] for value in theta[3:])
    told = bool((shares.max(axis=0) >= LEAST_SHARE).all())
    return status if inside and told else FitStatus.BOUND_HIT
