"""`L = E + A/N^alpha + B/D^beta`: loss by parameters N and training tokens D.

Hoffmann et al., arXiv 2203.15556, approach 3: Huber's loss of the differences of log losses, with
delta = 1e-3, summed over the points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from muonscale.errors import StudyError
from muonscale.lab.fits import allocation
from muonscale.lab.fits.bootstrap import Draws
from muonscale.lab.fits.findings import FitEstimate, estimate_quantity, format_significant
from muonscale.lab.fits.laws.base import LEAST_SHARE, LossLaw, Parameter, check_bounds
from muonscale.lab.fits.laws.separable import NOTHING, search_exponents
from muonscale.lab.fits.minimize import REFIT_GRADIENT, Model, minimize_huber, whiten
from muonscale.lab.fits.result import (
    FitStatus,
    FloatArray,
    Prediction,
    SizeRange,
    check_count,
    check_positive,
    count_distinct,
)

DELTA = 1e-3
LEAST_POINTS = 6
LEAST_SIZES = 3
MOST_CORRELATED = 0.999


@dataclass(frozen=True, kw_only=True, eq=False)
class ChinchillaLaw(LossLaw):
    """The law `L = E + A/N^alpha + B/D^beta`.

    On the axis of FLOPs it is the lowest loss for C = 6 N D (`muonscale.lab.fits.allocation`).
    """

    NAME = "chinchilla"
    FORMULA = "L = E + A/N^alpha + B/D^beta"
    COLUMNS = ("parameters", "tokens")
    PARAMETERS = (
        Parameter("A", "A"),
        Parameter("B", "B"),
        Parameter("E", "E"),
        Parameter("alpha", "alpha", log=False),
        Parameter("beta", "beta", log=False),
    )
    SIZE = "N"
    NOTE = "Best N and D are for C = 6 N D; a curve of the loss is the lowest for each C."
    # Resampled residuals give intervals that are too narrow: with a delta far below the noise, the
    # law goes through some of the points.
    RESAMPLES_POINTS = True

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    delta: float = DELTA

    @classmethod
    def fit(
        cls, parameters: ArrayLike, tokens: ArrayLike, loss: ArrayLike, delta: float = DELTA
    ) -> Self:
        """Fit the law to runs.

        Args:
            parameters: N of each run, `[n]`.
            tokens: D of each run, in training tokens.
            loss: loss of each run, in nats.
            delta: relative error at which the weight of a point begins to fall.

        Raises:
            StudyError: for values that are not positive and finite, fewer than six settings, fewer
                than three values of N or D, N and D whose logarithms correlate by more than 0.999,
                or a loss that does not fall with N or with D.
        """
        n, d, losses = check_positive(parameters=parameters, tokens=tokens, loss=loss)
        log_n, log_d, target = np.log(n), np.log(d), np.log(losses)
        settings = len({(round(a, 9), round(b, 9)) for a, b in zip(log_n, log_d, strict=True)})
        check_count(cls.FORMULA, "runs of different N or D", settings, LEAST_POINTS)
        check_count(cls.FORMULA, "different parameter counts N", count_distinct(n), LEAST_SIZES)
        check_count(cls.FORMULA, "different token counts D", count_distinct(d), LEAST_SIZES)
        correlation = float(np.corrcoef(log_n, log_d)[0, 1])
        if abs(correlation) > MOST_CORRELATED:
            raise StudyError(
                f"N and D vary together (their logarithms correlate by {correlation:.4f}), so "
                "their effects cannot be separated; vary one at a fixed value of the other"
            )

        middle_n, middle_d = log_n.mean(), log_d.mean()
        (alpha, beta), (e, a, b) = search_exponents([log_n - middle_n, log_d - middle_d], losses)
        for term, what in ((a, "parameters N"), (b, "tokens D")):
            if term <= NOTHING * losses.min():
                raise StudyError(
                    f"the losses do not fall with {what}, so {cls.FORMULA} cannot be fitted to "
                    "them; take runs over a wider range, or use `--law compute`"
                )
        e = max(e, LEAST_SHARE * losses.min())
        start = np.array(
            [np.log(a) + alpha * middle_n, np.log(b) + beta * middle_d, np.log(e), alpha, beta]
        )
        model = cls.log_model(log_n, log_d)
        theta, status = minimize_huber(model, start, target, np.ones_like(target), delta)
        status = check_bounds(theta, status, model, terms=3)
        return replace(cls.from_theta(theta, status, (n, d), losses), delta=delta)

    @staticmethod
    def log_model(log_n: FloatArray, log_d: FloatArray) -> Model:
        """Return the log loss at N and D, and its Jacobian, by log A, log B, log E, alpha, beta."""

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

    def __call__(self, parameters: ArrayLike, tokens: ArrayLike) -> FloatArray:
        """Return the loss at N and D, elementwise."""
        n, d = np.asarray(parameters, np.float64), np.asarray(tokens, np.float64)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def refit(self, tables: FloatArray, counts: FloatArray) -> tuple[FloatArray, int]:
        """Fit the law to other losses of the same runs, or to some of the runs several times."""
        model, theta = self.model, self.theta
        basis = whiten(model, theta, self.delta)
        fits = [
            minimize_huber(model, theta, table, count, self.delta, basis, REFIT_GRADIENT)
            for table, count in zip(tables, counts, strict=True)
        ]
        failed = sum(status is not FitStatus.CONVERGED for _, status in fits)
        return np.stack([theta for theta, _ in fits]), failed

    @property
    def places(self) -> FloatArray:
        """C of each run."""
        return allocation.FLOPS * self.x[0] * self.x[1]

    def holds(self, at: float) -> bool:
        """Return whether C is in the range of the runs, and so are the best N and D for it."""
        inside = SizeRange.of(self.places).holds(at)
        return inside and not self.allocate(at)[2].extrapolated

    @staticmethod
    def log_value(theta: FloatArray, at: float) -> FloatArray:
        """Return the log of the lowest loss for C FLOPs."""
        return allocation.log_best_loss(theta, at)

    @staticmethod
    def log_reach(theta: FloatArray, log_loss: float | FloatArray) -> FloatArray:
        """Return the log of the fewest FLOPs to a log loss; infinite at E or below."""
        return allocation.log_reach(theta, log_loss)

    def allocate(self, flops: float) -> tuple[Prediction, Prediction, Prediction]:
        """Return the N and D with the lowest loss for C = 6 N D, and that loss."""
        n = float(np.exp(allocation.log_parameters(self.theta, flops)))
        d = flops / (allocation.FLOPS * n)
        n_range, d_range = self.ranges
        return (
            Prediction(n, not n_range.holds(n)),
            Prediction(d, not d_range.holds(d)),
            self.predict(n, d),
        )

    def estimates(self, draws: Draws, at: Sequence[float] = ()) -> tuple[FitEstimate, ...]:
        """Return the parameters, and the best N, D and loss for some FLOPs."""
        rows = self.estimate_parameters(draws)
        quantities = (
            ("N", allocation.log_parameters),
            ("D", allocation.log_tokens),
            ("loss", allocation.log_best_loss),
        )
        for flops in sorted({*self.default_places(), *at}):
            for (name, quantity), best in zip(quantities, self.allocate(flops), strict=True):
                rows.append(
                    estimate_quantity(
                        f"best {name} at C = {format_significant(flops)}",
                        draws,
                        lambda theta, quantity=quantity, flops=flops: quantity(theta, flops),
                        best.extrapolated,
                        log=True,
                    )
                )
        return tuple(rows)
