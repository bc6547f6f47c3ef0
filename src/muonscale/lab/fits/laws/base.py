"""What a law is: a formula, the columns it needs, how it is fitted, and what it predicts.

`LossLaw` is the base of laws that give a loss for a number of FLOPs, `StepsLaw` of laws that give
the steps to a loss for a batch size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from muonscale.lab.fits.bootstrap import (
    CONFIDENCE,
    Draws,
    Seed,
    add_noise,
    check_degrees,
    resample_points,
    resample_residuals,
)
from muonscale.lab.fits.findings import FitEstimate, estimate_quantity, format_significant
from muonscale.lab.fits.minimize import Model, minimize_squares
from muonscale.lab.fits.result import FitStatus, FloatArray, Prediction, Residuals, SizeRange

EXPONENTS = (0.01, 3.0)
"""Points do not determine an exponent outside this range."""
LEAST_SHARE = 1e-3
"""Points do not determine a term that is a smaller part of what was measured at every point."""


class Parameter(NamedTuple):
    """A parameter of a law."""

    field: str
    """Name of the field of the law."""
    symbol: str
    """Its name in the formula."""
    log: bool = True
    """Whether the fit has its logarithm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Law(ABC):
    """A law that was fitted to points, in the logarithms of what was measured."""

    NAME: ClassVar[str]
    """What `--law` calls it."""
    FORMULA: ClassVar[str]
    COLUMNS: ClassVar[tuple[str, ...]]
    """Sizes that it takes, keys of `tables.ALIASES`."""
    MEASURED: ClassVar[str]
    """What it predicts, also a key of `tables.ALIASES`."""
    PARAMETERS: ClassVar[tuple[Parameter, ...]]
    """Its own fields, in the order of theta."""
    SIZE: ClassVar[str]
    """Symbol of the first size, whose rungs are left out in turn."""
    X_LABEL: ClassVar[str]
    """Label of the axis of `places` and `log_value`."""
    Y_LABEL: ClassVar[str]
    NOTE: ClassVar[str] = ""
    """What a reader of the results must know."""
    RESAMPLES_POINTS: ClassVar[bool] = False
    """Whether intervals come from resampled points instead of resampled residuals."""

    x: tuple[FloatArray, ...] = field(repr=False)
    """The sizes that it was fitted to, `[n]` for each of `COLUMNS`."""
    y: FloatArray = field(repr=False)
    """What was measured there, `[n]`."""
    status: FitStatus
    residuals: Residuals

    @classmethod
    @abstractmethod
    def fit(cls, *columns: Any, **options: Any) -> Self:
        """Fit the law to `COLUMNS` and `MEASURED`, `[n]` each, or raise StudyError."""

    @abstractmethod
    def __call__(self, *sizes: Any, **named: Any) -> FloatArray:
        """Return what the law predicts at sizes, elementwise."""

    @staticmethod
    @abstractmethod
    def log_model(*log_sizes: Any, **named: Any) -> Model:
        """Return the log predictions at points, and their Jacobian, as a function of theta."""

    @staticmethod
    @abstractmethod
    def log_value(theta: FloatArray, at: float) -> FloatArray:
        """Return the log prediction of laws `[..., p]` at a place on the axis of `X_LABEL`."""

    @abstractmethod
    def estimates(self, draws: Draws, at: Sequence[float] = ()) -> tuple[FitEstimate, ...]:
        """Return the parameters and what follows from them, with intervals.

        Args:
            draws: draws of this law.
            at: places on the axis of `X_LABEL`; each law has its own if there are none.
        """

    @classmethod
    def from_theta(
        cls, theta: FloatArray, status: FitStatus, x: tuple[FloatArray, ...], y: FloatArray
    ) -> Self:
        """Return the law with the parameters that a search found.

        Args:
            theta: the parameters, `[p]`.
            status: how the search ended.
            x: the sizes that it was fitted to.
            y: what was measured there.
        """
        predicted, _ = cls.log_model(*map(np.log, x))(theta)
        fields = {
            parameter.field: float(np.exp(value)) if parameter.log else float(value)
            for parameter, value in zip(cls.PARAMETERS, theta, strict=True)
        }
        residuals = Residuals.of(np.log(y) - predicted, len(theta))
        return cls(**fields, status=status, residuals=residuals, x=x, y=y)

    @property
    def theta(self) -> FloatArray:
        """The parameters as the fit has them, `[p]`: the logarithms of those that are positive."""
        values = [(getattr(self, parameter.field), parameter.log) for parameter in self.PARAMETERS]
        return np.array([np.log(value) if log else value for value, log in values])

    @property
    def model(self) -> Model:
        """The log predictions at the points of the fit, as a function of theta."""
        return self.log_model(*map(np.log, self.x))

    @property
    def remark(self) -> str:
        """What the points do not determine; empty if the fit converged."""
        return self.status.remark

    @property
    def places(self) -> FloatArray:
        """Where each point is on the axis of `X_LABEL`."""
        return self.x[0]

    @property
    def ranges(self) -> tuple[SizeRange, ...]:
        """The range of each size over the points."""
        return tuple(SizeRange.of(sizes) for sizes in self.x)

    @property
    def is_determined(self) -> bool:
        """Whether the law may be drawn and compared: here always."""
        return True

    def holds(self, at: float) -> bool:
        """Return whether the law is not extrapolated at a place on the axis of `X_LABEL`."""
        return SizeRange.of(self.places).holds(at)

    def predict(self, *sizes: float) -> Prediction:
        """Return the prediction at sizes. It is extrapolated if any size is outside its range."""
        inside = all(r.holds(size) for r, size in zip(self.ranges, sizes, strict=True))
        return Prediction(float(self(*sizes)), not inside)

    def estimate_parameters(self, draws: Draws) -> list[FitEstimate]:
        """Return the parameters, with intervals."""
        return [
            estimate_quantity(
                parameter.symbol, draws, lambda theta, i=i: theta[..., i], log=parameter.log
            )
            for i, parameter in enumerate(self.PARAMETERS)
        ]

    def refit(self, tables: FloatArray, counts: FloatArray) -> tuple[FloatArray, int]:
        """Fit the law to other measurements at the same sizes, here by least squares.

        Args:
            tables: log measurements, `[r, n]`.
            counts: how often each point counts, `[r, n]`; ones unless `RESAMPLES_POINTS`.

        Returns:
            The parameters `[r, p]`, and how many of the fits did not end at a minimum.
        """
        fits = [minimize_squares(self.model, self.theta, table) for table in tables]
        failed = sum(status is not FitStatus.CONVERGED for _, status in fits)
        return np.stack([theta for theta, _ in fits]), failed

    def draw(
        self,
        resamples: int = 1000,
        seed: Seed = 0,
        level: float = CONFIDENCE,
        noise: float | None = None,
    ) -> Draws:
        """Refit the law to tables that might have been measured instead.

        Args:
            resamples: number of tables.
            seed: seed of the tables. Laws that are compared need different ones: `(seed, 1)`
                and `(seed, 2)`.
            level: level of the intervals.
            noise: standard deviation of a log measurement over seeds, if it is known. If it is None
                the residuals or the points are resampled, which takes two points more than
                parameters.

        Raises:
            StudyError: for too few points or resamples.
        """
        target, generator = np.log(self.y), np.random.default_rng(seed)
        fitted, jacobian = self.model(self.theta)
        counts = np.ones((resamples, len(target)))
        if noise is not None:
            tables = add_noise(fitted, noise, resamples, generator)
        elif self.RESAMPLES_POINTS:
            check_degrees(*jacobian.shape)
            counts = resample_points(len(target), resamples, generator)
            tables = np.broadcast_to(target, counts.shape)
        else:
            residuals = target - fitted
            tables = resample_residuals(fitted, residuals, jacobian, resamples, generator, level)
        samples, failed = self.refit(tables, counts)
        return Draws(self.theta, samples, level, failed)


class LossLaw(Law):
    """A law of the loss, which gives the lowest loss for every number of FLOPs."""

    MEASURED = "loss"
    X_LABEL = "FLOPs"
    Y_LABEL = "loss"

    @staticmethod
    @abstractmethod
    def log_reach(theta: FloatArray, log_loss: float | FloatArray) -> FloatArray:
        """Return log FLOPs at which laws `[..., p]` have a log loss; infinite if they never do."""

    @property
    def is_determined(self) -> bool:
        """Whether the fit converged: a loss between or beyond the runs is arbitrary otherwise."""
        return self.status is FitStatus.CONVERGED

    def default_places(self) -> tuple[float, float]:
        """Return the FLOPs of the largest run, and ten times as many."""
        largest = float(self.places.max())
        return largest, 10 * largest

    def estimates(self, draws: Draws, at: Sequence[float] = ()) -> tuple[FitEstimate, ...]:
        """Return the parameters, and the loss at the default places and at other FLOPs."""
        losses = [
            estimate_quantity(
                f"loss at C = {format_significant(flops)}",
                draws,
                lambda theta, flops=flops: self.log_value(theta, flops),
                not self.holds(flops),
                log=True,
            )
            for flops in sorted({*self.default_places(), *at})
        ]
        return (*self.estimate_parameters(draws), *losses)


class StepsLaw(Law):
    """A law of the steps to one loss by batch size, in tokens or sequences."""

    COLUMNS = ("batch",)
    MEASURED = "steps"
    SIZE = "B"
    X_LABEL = "batch size"
    Y_LABEL = "steps to the target"


def check_bounds(theta: FloatArray, status: FitStatus, model: Model, terms: int) -> FitStatus:
    """Return BOUND_HIT if the points do not determine a term or an exponent, else `status`.

    Args:
        theta: the logarithms of the terms, then the exponents.
        status: how the search ended.
        model: the law. Its derivative by the logarithm of a term is the share of that term.
        terms: number of terms.
    """
    shares, exponents = model(theta)[1][:, :terms], theta[terms:]
    determined = (shares.max(axis=0) >= LEAST_SHARE).all()
    inside = ((exponents >= EXPONENTS[0]) & (exponents <= EXPONENTS[1])).all()
    return status if determined and inside else FitStatus.BOUND_HIT
