"""The ratio of tokens R(B) of two optimizers, and the claims of the paper about it.

Practical Efficiency of Muon, arXiv 2505.02222, section 3.2: R is above 1 at every batch size and
does not decrease, Muon's token-optimal batch is at least AdamW's, and Muon needs 10 to 15 % fewer
tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from muonscale.lab.fits.bootstrap import join
from muonscale.lab.fits.findings import (
    FitCurve,
    FitEstimate,
    estimate_quantity,
    format_ends,
    format_significant,
    trace_curve,
)
from muonscale.lab.fits.laws.regimes import log_ratio, ratio_exponents
from muonscale.lab.fits.result import FloatArray, Interval
from muonscale.lab.fits.rising import SIGNIFICANT, Rising, judge_rising
from muonscale.lab.fits.statistics import adjust_holm, student_quantile
from muonscale.lab.studies.analysis.seed_blocks import Blocks
from muonscale.lab.studies.batch.laws import POINTS, VariantLaws
from muonscale.lab.studies.batch.measurements import Cell, Key

LEAST_SAVED = 0.1
"""Share of tokens that Muon saves at least, by the paper: 10 to 15 %."""
REGIME_NAMES = ("below both B*", "between them", "beyond both")


@dataclass(frozen=True)
class RatioRow:
    """R at one batch size."""

    batch: int
    ratio: float
    """NaN if neither reached the loss."""
    low: float = math.nan
    high: float = math.nan
    """Ends of its 90 % interval; NaN without noise to judge by."""
    censored: str = ""
    """`>` if only the other variant reached the loss, `<` if only the baseline did."""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and whether it holds here."""

    text: str
    passed: bool | None


@dataclass(frozen=True)
class TokenRatio:
    """R of the baseline to another variant."""

    other: str
    rows: list[RatioRow]
    saved: Interval
    """Share of the baseline's tokens that the other saves: 1 - 1/R, with R the geometric mean over
    the batch sizes at which both reached the loss."""
    rising: Rising | None
    """None if both reached the loss at fewer than two batch sizes."""
    claims: list[Claim]
    predicted: FitCurve | None
    """R by the three-regime laws of both."""
    exponents: tuple[FitEstimate, ...]
    """Exponents of B in R in the three regimes, by these laws."""


def measure_token_ratio(
    cells: dict[Key, Cell],
    blocks: Blocks[Key] | None,
    laws: dict[str, VariantLaws],
    names: tuple[str, str],
    *,
    tuned: bool,
) -> TokenRatio:
    """Return the ratio of the first of two variants, the baseline, to the second.

    Args:
        cells: tokens to the target by variant and batch size.
        blocks: means and noise of log tokens of all cells that reached the target.
        laws: laws by variant.
        names: the two variants.
        tuned: whether the best settings of both are tuned at every batch size; else no claim is
            judged.
    """
    base, other = names
    batches = sorted({batch for _, batch in cells})
    rows = [_compare_cells(cells[base, b], cells[other, b], blocks) for b in batches]
    both = [row.batch for row in rows if not row.censored and not math.isnan(row.ratio)]
    change, saved = None, Interval(math.nan, math.nan, math.nan)
    if blocks is not None and both:
        contrast = np.zeros((len(both), len(blocks.groups)))
        for place, batch in enumerate(both):
            contrast[place, blocks.groups.index((base, batch))] = 1
            contrast[place, blocks.groups.index((other, batch))] = -1
        covariance = blocks.sigma**2 * contrast @ blocks.covariance @ contrast.T
        log_r = contrast @ np.array(blocks.means)
        saved = _saved_share(log_r, covariance, blocks.freedom)
        if len(both) > 1:
            change = judge_rising(both, log_r, covariance, blocks.freedom)
    claims = [
        _judge_above_one(rows, blocks, names),
        _judge_non_decreasing(change),
        _judge_larger_optimal(laws, names),
        _judge_saved(saved, names),
    ]
    if not tuned:
        claims = [Claim(f"{claim.text}; not tuned", None) for claim in claims]
    predicted, exponents = None, ()
    first, second = (laws[name].regime_draws for name in names)
    if first is not None and second is not None and len(both) > 1:
        draws = join(first, second)
        grid = np.geomspace(both[0], both[-1], POINTS)
        predicted = trace_curve(draws, grid, lambda theta: log_ratio(theta, np.log(grid)))
        exponents = tuple(
            estimate_quantity(name, draws, lambda theta, n=place: ratio_exponents(theta)[..., n])
            for place, name in enumerate(REGIME_NAMES)
        )
    return TokenRatio(other, rows, saved, change, claims, predicted, exponents)


def _compare_cells(base: Cell, other: Cell, blocks: Blocks[Key] | None) -> RatioRow:
    def tokens(cell: Cell) -> float:
        return math.exp(sum(cell.log_tokens.values()) / len(cell.log_tokens))

    states = (base.state, other.state)
    if states == ("reached", "reached") and blocks is not None:
        found = blocks.difference((base.variant, base.batch), (other.variant, other.batch))
        return RatioRow(base.batch, *np.exp([found.estimate, found.low, found.high]).tolist())
    if states == (">", "reached"):
        return RatioRow(base.batch, base.bound / tokens(other), censored=">")
    if states == ("reached", ">"):
        return RatioRow(base.batch, tokens(base) / other.bound, censored="<")
    return RatioRow(base.batch, math.nan)


def _saved_share(log_r: FloatArray, covariance: FloatArray, freedom: int) -> Interval:
    mean = float(log_r.mean())
    half = student_quantile(freedom) * math.sqrt(max(0.0, float(covariance.mean())))
    return Interval(*(1 - math.exp(-x) for x in (mean, mean - half, mean + half)))


def _ends(value: RatioRow | Interval) -> str:
    return format_ends(value.low, value.high) or "no interval"


def _judge_above_one(
    rows: list[RatioRow], blocks: Blocks[Key] | None, names: tuple[str, str]
) -> Claim:
    """It holds if every interval is above 1, and not if R is below 1, p < 5 % after Holm."""
    measured = [row for row in rows if not math.isnan(row.low)]
    text = f"tokens of {names[0]} / {names[1]} are above 1 at every batch size"
    if blocks is None or not measured:
        return Claim(f"{text}: no interval to judge by", None)
    p_values = [blocks.difference(*((name, row.batch) for name in names)).p for row in measured]
    lowest = min(measured, key=lambda row: row.ratio)
    text += (
        f": the lowest is {format_significant(lowest.ratio)} ({_ends(lowest)}) at {lowest.batch:,}"
    )
    if min(adjust_holm(p_values)) < SIGNIFICANT:
        return Claim(text, False)
    if len(measured) < len(rows):
        text += f"; both reached the loss at {len(measured)} of {len(rows)}"
    everywhere = all(row.low > 1 or (row.censored == ">" and row.ratio > 1) for row in rows)
    return Claim(text, everywhere or None)


def _judge_non_decreasing(change: Rising | None) -> Claim:
    text = "the ratio does not decrease with the batch"
    if change is None:
        return Claim(f"{text}: both reached the loss at fewer than two batch sizes", None)
    slope = format_significant(change.slope.value)
    text += f": slope of log R over log B {slope} ({_ends(change.slope)})"
    if (drop := change.drop) is None:
        return Claim(f"{text}, no drop", change.non_decreasing)
    p = "unknown" if math.isnan(drop.p_adjusted) else f"{drop.p_adjusted:.2g}"
    text += (
        f", largest drop {-math.expm1(-drop.size):.1%} from {drop.start:,.0f} to {drop.end:,.0f} "
        f"(adjusted p {p})"
    )
    return Claim(text, change.non_decreasing)


def _judge_larger_optimal(laws: dict[str, VariantLaws], names: tuple[str, str]) -> Claim:
    base, other = (laws[name].optimal for name in names)
    text = f"the token-optimal batch of {names[1]} is at least that of {names[0]}"
    if not base.estimates or not other.estimates:
        return Claim(f"{text}: {base.refused or other.refused}", None)
    text += f": {other.estimates[0].value:,.0f} and {base.estimates[0].value:,.0f}"
    first, second = (laws[name].optimal_draws for name in names)
    if base.remark and base.remark == other.remark:
        return Claim(f"{text}, an end of the measured batch sizes", None)
    if first is None or second is None or not len(first.samples):
        return Claim(f"{text}, no interval to judge by", None)
    found = join(first, second).interval(lambda theta: theta[..., 1] / theta[..., 0])
    text += f", ratio {format_significant(found.value)} ({_ends(found)})"
    return Claim(text, True if found.low >= 1 else False if found.high < 1 else None)


def _judge_saved(saved: Interval, names: tuple[str, str]) -> Claim:
    text = f"{names[1]} saves at least {LEAST_SAVED:.0%} of the tokens of {names[0]}"
    if math.isnan(saved.value):
        return Claim(f"{text}: both reached the loss at no batch size", None)
    text += f": {saved.value:.1%} in the mean over batch sizes"
    if math.isnan(saved.low):
        return Claim(f"{text}, no interval to judge by", None)
    text += f" ({saved.low:.1%} to {saved.high:.1%})"
    judged = True if saved.low >= LEAST_SAVED else False if saved.high < LEAST_SAVED else None
    return Claim(text, judged)
