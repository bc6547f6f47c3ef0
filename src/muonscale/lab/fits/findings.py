"""What the fits to a table say, in one form for a console, for JSON and for a page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np

from muonscale.lab.fits.bootstrap import Draws, Quantity
from muonscale.lab.fits.leave_out import HeldOut
from muonscale.lab.fits.result import FloatArray
from muonscale.lab.fits.status import FitStatus

Numbers = tuple[float, ...]

REMARKS = {
    FitStatus.CONVERGED: "",
    FitStatus.BOUND_HIT: "a term or an exponent went to the edge of its range: these runs do not tell it",
    FitStatus.MAX_ITERATIONS: "the search ended before a minimum: do not rely on these numbers",
    FitStatus.ABNORMAL: "the search gave up away from a minimum: do not rely on these numbers",
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number that a fit gives."""

    name: str
    value: float
    low: float
    """Ends of the interval; NaN if there is none, infinite if it has no end."""
    high: float
    extrapolated: bool = False


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A law along the horizontal axis, with its band."""

    x: Numbers
    y: Numbers
    low: Numbers
    high: Numbers


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A law fitted to the runs of one group."""

    name: str
    """The group; empty when the table has only one."""
    runs: int
    status: FitStatus
    remark: str
    rms: float
    """Root mean square of the log residuals, degrees of freedom counted."""
    largest: float
    seed_noise: float | None
    """Standard deviation of the log measurement over repeated settings, if there are any."""
    estimates: tuple[Estimate, ...]
    without_intervals: str
    """Why there are none; empty if there are."""
    failed_resamples: int
    held_out: tuple[HeldOut, ...]
    without_held_out: str
    measured_x: Numbers
    measured_y: Numbers
    curve: Curve


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How two groups compare, at several places."""

    first: str
    second: str
    what: str
    """Of what the ratio first / second is, and when."""
    at: str
    """What the names of the rows are values of."""
    places: Numbers
    rows: tuple[Estimate, ...]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that the fits to a table say."""

    source: str
    law: str
    level: float
    resamples: int
    seed: int
    rung: str
    """What is left out in turn."""
    x_label: str
    y_label: str
    fits: tuple[Fitted, ...]
    ratios: tuple[Ratio, ...]
    notes: tuple[str, ...]

    def json(self) -> str:
        """Return all of it as JSON. Numbers that are NaN or infinite become null."""
        return json.dumps(_plain(asdict(self)), indent=2)


def estimate(
    name: str, draws: Draws, quantity: Quantity, extrapolated: bool = False, log: bool = False
) -> Estimate:
    """Return an estimate with its interval; of the exponential of a quantity if `log`."""
    found = draws.interval(quantity)
    ends = (found.value, found.low, found.high)
    with np.errstate(over="ignore"):  # an interval may have no upper end
        value, low, high = np.exp(ends).tolist() if log else ends
    return Estimate(name=name, value=value, low=low, high=high, extrapolated=extrapolated)


def curve(draws: Draws, x: FloatArray, log_quantity: Quantity) -> Curve:
    """Return a law along `x` `[k]`; the quantity is the log of `[..., k]`."""
    with np.errstate(over="ignore"):
        y, low, high = (tuple(np.exp(values).tolist()) for values in draws.band(log_quantity))
    return Curve(x=tuple(x.tolist()), y=y, low=low, high=high)


def number(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:.4g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
