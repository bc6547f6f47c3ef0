"""The ratio of tokens R(B) of two optimizers, and what it says about the claims of the paper.

Practical Efficiency of Muon, arXiv 2505.02222, section 3.2: R is above 1 at every batch size and
non-decreasing, Muon's token-optimal batch is at least AdamW's, and Muon takes 10 to 15 % fewer tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from muonscale.lab.fits.bootstrap import LEVEL, Draws, join
from muonscale.lab.fits.findings import (
    FitCurve,
    FitEstimate,
    estimate,
    format_significant,
    trace_curve,
)
from muonscale.lab.fits.laws.regimes import log_ratio, ratio_exponents
from muonscale.lab.fits.result import FloatArray, Interval
from muonscale.lab.fits.rising import SIGNIFICANT, Rising, judge_rising
from muonscale.lab.fits.statistics import adjust_holm
from muonscale.lab.studies.analysis.seed_blocks import Blocks
from muonscale.lab.studies.batch.laws import POINTS, Laws
from muonscale.lab.studies.batch.measurements import Cell, Key

LEAST_SAVED = 0.1
"""What the paper says that Muon saves: 10 to 15 % of the tokens."""
REGIME_NAMES = ("below both B*", "between them", "beyond both")


@dataclass(frozen=True)
class Row:
    """R at one batch size."""

    batch: int
    ratio: float
    """NaN where neither reached the loss, or nothing was measured."""
    low: float
    high: float
    """Ends of its 90 % interval; NaN without noise to judge by."""
    censored: str
    """`>` where only the other variant reached the loss, `<` where only the baseline did."""


@dataclass(frozen=True)
class Claim:
    """Something the paper says, and whether it shows here."""

    text: str
    passed: bool | None


@dataclass(frozen=True)
class Ratio:
    """R of the baseline to another variant."""

    other: str
    rows: list[Row]
    saved: Interval
    """Part of the baseline's tokens that the other does without: 1 - 1/R, R being the geometric mean
    over batch sizes at which both reached the loss."""
    rising: Rising | None
    """None where both reached the loss at fewer than two batch sizes."""
    claims: list[Claim]
    predicted: FitCurve | None
    """R by the three-regime laws of both."""
    exponents: tuple[FitEstimate, ...]
    """Of B in R in the three regimes, by these laws."""


def ratio_of(
    cells: dict[Key, Cell],
    blocks: Blocks[Key] | None,
    laws: dict[str, Laws],
    names: tuple[str, str],
) -> Ratio:
    """Return the ratio of the first of two variants, the baseline, to the second."""
    base, other = names
    batches = sorted({batch for _, batch in cells})
    rows = [_row(cells[base, b], cells[other, b], blocks) for b in batches]
    both = [row.batch for row in rows if not row.censored and not math.isnan(row.ratio)]
    change, saved = None, Interval(math.nan, math.nan, math.nan)
    if blocks is not None and both:
        log_r, covariance = _log_ratios(blocks, base, other, both)
        saved = _saved(log_r, covariance, blocks.freedom)
        if len(both) > 1:
            change = judge_rising(both, log_r, covariance, blocks.freedom)
    claims = [
        _above_one(rows, blocks, names),
        _non_decreasing(change),
        _larger_optimal(laws, names),
        _saves(saved, names),
    ]
    predicted, exponents = _predicted(laws, names, both)
    return Ratio(other, rows, saved, change, claims, predicted, exponents)


def _row(base: Cell, other: Cell, blocks: Blocks[Key] | None) -> Row:
    nan = math.nan
    states = (base.state, other.state)
    if states == ("reached", "reached") and blocks is not None:
        found = blocks.difference((base.variant, base.batch), (other.variant, other.batch))
        ratio, low, high = np.exp([found.estimate, found.low, found.high]).tolist()
        return Row(base.batch, ratio, low, high, "")
    if states == (">", "reached"):
        return Row(base.batch, base.bound / _tokens(other), nan, nan, ">")
    if states == ("reached", ">"):
        return Row(base.batch, _tokens(base) / other.bound, nan, nan, "<")
    return Row(base.batch, nan, nan, nan, "")


def _tokens(cell: Cell) -> float:
    return math.exp(sum(cell.log_tokens.values()) / len(cell.log_tokens))


def _log_ratios(
    blocks: Blocks[Key], base: str, other: str, batches: list[int]
) -> tuple[FloatArray, FloatArray]:
    """Return log R at some batch sizes, and their covariance (NaN without noise)."""
    contrast = np.zeros((len(batches), len(blocks.groups)))
    for place, batch in enumerate(batches):
        contrast[place, blocks.groups.index((base, batch))] = 1
        contrast[place, blocks.groups.index((other, batch))] = -1
    covariance = blocks.sigma**2 * contrast @ blocks.covariance @ contrast.T
    return contrast @ np.array(blocks.means), covariance


def _saved(log_r: FloatArray, covariance: FloatArray, freedom: int) -> Interval:
    mean = float(log_r.mean())
    half = math.nan
    if freedom:
        error = math.sqrt(max(0.0, float(covariance.mean())))
        half = float(student.ppf((1 + LEVEL) / 2, freedom)) * error
    return Interval(*(1 - math.exp(-x) for x in (mean, mean - half, mean + half)))


def _above_one(rows: list[Row], blocks: Blocks[Key] | None, names: tuple[str, str]) -> Claim:
    """Holds if every interval lies above 1; does not if R is below 1 somewhere, p < 5 % after Holm."""
    told = [row for row in rows if not math.isnan(row.low)]
    text = f"tokens of {names[0]} / {names[1]} are above 1 at every batch size"
    if blocks is None or not told:
        return Claim(f"{text}: no interval to judge by", None)
    p_values = [blocks.difference(*((name, row.batch) for name in names)).p for row in told]
    lowest = min(told, key=lambda row: row.ratio)
    text += (
        f": the lowest is {format_significant(lowest.ratio)} ({_ends(lowest)}) at {lowest.batch:,}"
    )
    if min(adjust_holm(p_values)) < SIGNIFICANT:
        return Claim(text, False)
    if len(told) < len(rows):
        text += f"; both reached the loss at {len(told)} of {len(rows)}"
    everywhere = all(row.low > 1 or (row.censored == ">" and row.ratio > 1) for row in rows)
    return Claim(text, True if everywhere else None)


def _ends(value: Row | Interval | FitEstimate) -> str:
    return (
        "no interval"
        if math.isnan(value.low)
        else f"{format_significant(value.low)} to {format_significant(value.high)}"
    )


def _non_decreasing(change: Rising | None) -> Claim:
    text = "the ratio does not decrease with the batch"
    if change is None:
        return Claim(f"{text}: both reached the loss at fewer than two batch sizes", None)
    text += f": slope of log R over log B {format_significant(change.slope.value)} ({_ends(change.slope)})"
    if (drop := change.drop) is None:
        return Claim(f"{text}, no drop", change.non_decreasing)
    p = "unknown" if math.isnan(drop.p_adjusted) else f"{drop.p_adjusted:.2g}"
    text += (
        f", largest drop {-math.expm1(-drop.size):.1%} from {drop.start:,.0f} to {drop.end:,.0f} "
        f"(adjusted p {p})"
    )
    return Claim(text, change.non_decreasing)


def _larger_optimal(laws: dict[str, Laws], names: tuple[str, str]) -> Claim:
    base, other = (laws[name].optimal for name in names)
    text = f"the token-optimal batch of {names[1]} is at least that of {names[0]}"
    if not base.estimates or not other.estimates:
        return Claim(f"{text}: {base.refused or other.refused}", None)
    values = [each.estimates[0].value for each in (other, base)]
    text += f": {values[0]:,.0f} and {values[1]:,.0f}"
    draws = [laws[name].optimal_draws for name in names]
    if base.remark and base.remark == other.remark:
        return Claim(f"{text}, an end of what was measured", None)
    if draws[0] is None or draws[1] is None or not len(draws[0].samples):
        return Claim(f"{text}, no interval to judge by", None)
    joined = join(draws[0], draws[1])
    found = joined.interval(lambda theta: theta[..., 1] / theta[..., 0])
    text += f", ratio {format_significant(found.value)} ({_ends(found)})"
    return Claim(text, True if found.low >= 1 else False if found.high < 1 else None)


def _saves(saved: Interval, names: tuple[str, str]) -> Claim:
    text = f"{names[1]} saves at least {LEAST_SAVED:.0%} of the tokens of {names[0]}"
    if math.isnan(saved.value):
        return Claim(f"{text}: both reached the loss at no batch size", None)
    text += f": {saved.value:.1%} in the mean over batch sizes"
    if math.isnan(saved.low):
        return Claim(f"{text}, no interval to judge by", None)
    text += f" ({saved.low:.1%} to {saved.high:.1%})"
    judged = True if saved.low >= LEAST_SAVED else False if saved.high < LEAST_SAVED else None
    return Claim(text, judged)


def _predicted(
    laws: dict[str, Laws], names: tuple[str, str], batches: list[int]
) -> tuple[FitCurve | None, tuple[FitEstimate, ...]]:
    """Return R by the three-regime laws over the batch sizes that both reached, and its exponents."""
    first, second = (laws[name].regime_draws for name in names)
    if first is None or second is None or len(batches) < 2:
        return None, ()
    joined: Draws = join(first, second)
    grid = np.geomspace(batches[0], batches[-1], POINTS)
    exponents = tuple(
        estimate(name, joined, lambda theta, n=place: ratio_exponents(theta)[..., n])
        for place, name in enumerate(REGIME_NAMES)
    )
    return trace_curve(joined, grid, lambda theta: log_ratio(theta, np.log(grid))), exponents
