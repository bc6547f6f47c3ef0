"""The results of the fits to a table, in one form for the console, for JSON and for a page."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from muonscale.lab.files import to_json
from muonscale.lab.fits.bootstrap import Draws, Quantity
from muonscale.lab.fits.leave_out import LeftOut
from muonscale.lab.fits.result import FitStatus, FloatArray

Numbers = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FitEstimate:
    """A number that follows from a fit, with its interval."""

    name: str
    value: float
    low: float
    """Lower end of the interval: NaN if there is none, infinite if it has no end."""
    high: float
    extrapolated: bool = False


@dataclass(frozen=True, kw_only=True)
class FitCurve:
    """A law along the horizontal axis, with its band."""

    x: Numbers
    y: Numbers
    low: Numbers
    high: Numbers


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A law fitted to the runs of one group."""

    name: str
    """Name of the group; empty if the table has only one."""
    runs: int
    status: FitStatus
    remark: str
    rms: float
    """Root mean square of the log residuals, with the degrees of freedom counted."""
    largest: float
    seed_noise: float | None
    """Standard deviation of the log measurement over repeated settings, if there are any."""
    estimates: tuple[FitEstimate, ...]
    without_intervals: str
    """Why the estimates have no intervals; empty if they have."""
    failed_resamples: int
    left_out: tuple[LeftOut, ...]
    none_left_out: str
    """Why no rung was left out; empty if rungs were."""
    measured_x: Numbers
    measured_y: Numbers
    curve: FitCurve | None
    """None if the runs do not determine the law."""


@dataclass(frozen=True, kw_only=True)
class FitRatio:
    """How two groups compare, at several places."""

    first: str
    second: str
    what: str
    """What the ratio first / second is of, such as FLOPs at equal loss."""
    at: str
    """What `places` are values of."""
    places: Numbers
    rows: tuple[FitEstimate, ...]
    undetermined: tuple[str, ...] = ()
    """Groups whose law is not determined by its runs, so that the ratio says nothing."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The results of all fits to a table."""

    source: str
    law: str
    level: float
    resamples: int
    seed: int
    rung: str
    """Name of the size whose rungs are left out in turn."""
    x_label: str
    y_label: str
    fits: tuple[Fitted, ...]
    ratios: tuple[FitRatio, ...]
    notes: tuple[str, ...]

    def json(self) -> str:
        """Return all of it as JSON. Numbers that are NaN or infinite become null."""
        return to_json(asdict(self))


def estimate_quantity(
    name: str, draws: Draws, quantity: Quantity, extrapolated: bool = False, log: bool = False
) -> FitEstimate:
    """Estimate a quantity with its interval; if `log`, the exponential of the quantity."""
    found = draws.interval(quantity)
    ends = (found.value, found.low, found.high)
    with np.errstate(over="ignore"):  # an interval may have no upper end
        value, low, high = np.exp(ends).tolist() if log else ends
    return FitEstimate(name=name, value=value, low=low, high=high, extrapolated=extrapolated)


def trace_curve(draws: Draws, x: FloatArray, log_quantity: Quantity) -> FitCurve:
    """Return a law along `x` `[k]`, from the logarithm of the law `[..., k]`."""
    with np.errstate(over="ignore"):
        y, low, high = (tuple(np.exp(values).tolist()) for values in draws.band(log_quantity))
    return FitCurve(x=tuple(x.tolist()), y=y, low=low, high=high)


def format_significant(value: float) -> str:
    """Return a number with four significant digits."""
    return f"{value:.4g}"


def format_ends(low: float, high: float) -> str:
    """Return an interval with four significant digits, nothing if its low end is NaN."""
    return "" if math.isnan(low) else f"{format_significant(low)} to {format_significant(high)}"
