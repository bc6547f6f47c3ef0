"""From a table of runs to batch-size laws: of each group and target loss, and of groups compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import LEVEL, Draws, Seed, join
from muonscale.lab.fits.checks import positive
from muonscale.lab.fits.findings import (
    REMARKS,
    Estimate,
    Findings,
    Fitted,
    Ratio,
    curve,
    estimate,
    number,
)
from muonscale.lab.fits.groups import baseline, labelled, split
from muonscale.lab.fits.laws import batch
from muonscale.lab.fits.leave_out import leave_rungs_out
from muonscale.lab.fits.noise import seed_noise
from muonscale.lab.fits.result import FloatArray, Span
from muonscale.lab.fits.tables import RunTable

ROWS = 5
CURVE = 60


@dataclass(frozen=True, kw_only=True)
class AskedBatch:
    """What to make of a table."""

    by: str | None = None
    """Column of the groups; the table's optimizer column when not given."""
    reference: str | None = None
    """Group that the others are compared with."""
    base: float | None = None
    """Batch that the 20 % overhead is counted from; the smallest of each group when not given."""
    resamples: int = 1000
    seed: int = 0
    level: float = LEVEL


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Runs of one group that reached one target, and their law."""

    optimizer: str
    target: str
    fitted: Fitted
    draws: Draws
    batches: Span

    @property
    def name(self) -> str:
        return _name(self.optimizer, self.target)


def fit_batches(table: RunTable, asked: AskedBatch) -> Findings:
    """Fit `S(B) = Smin + Emin/B` to each group and target of a table, and compare the groups.

    Raises:
        StudyError: for a table that lacks a column, or a group that the law cannot be fitted to.
    """
    if asked.base is not None:
        positive(base=[asked.base])
    groups: list[_Group] = []
    for optimizer, rows in split(table, asked.by or table.name("optimizer")).items():
        for target, runs in split(rows, table.name("target")).items():
            try:
                # Groups are drawn independently of each other.
                groups.append(_fit(optimizer, target, runs, asked, (asked.seed, len(groups))))
            except StudyError as error:
                raise labelled(_name(optimizer, target), error) from error
    return Findings(
        source=str(table.path),
        law=batch.NAME,
        level=asked.level,
        resamples=asked.resamples,
        seed=asked.seed,
        rung="B",
        x_label="batch size",
        y_label="steps to the target",
        fits=tuple(group.fitted for group in groups),
        ratios=tuple(_ratios(groups, asked.reference)),
        notes=_notes(table),
    )


def _steps(table: RunTable, batches: FloatArray) -> FloatArray:
    """Return S of each run: its column, else tokens over batch."""
    if table.name("steps") or not table.name("tokens"):
        return table.numbers("steps")
    return table.numbers("tokens") / batches


def _notes(table: RunTable) -> tuple[str, ...]:
    notes = ["Emin and critical batch sizes are in what the column of batches counts."]
    if not table.name("steps"):
        notes.append("Steps are tokens / batch: the table has no column of steps.")
    return tuple(notes)


def _fit(optimizer: str, target: str, table: RunTable, asked: AskedBatch, seed: Seed) -> _Group:
    batches = table.numbers("batch")
    steps = _steps(table, batches)
    law = batch.fit_batch(batches, steps)
    try:
        draws = batch.draw_batch(law, batches, steps, asked.resamples, seed, asked.level)
        why = ""
    except StudyError as error:
        draws, why = Draws.none(law.theta, asked.level), str(error)
    held_out, why_not = (), ""
    try:
        held_out = leave_rungs_out(
            batches, steps, lambda kept: batch.fit_batch(batches[kept], steps[kept])(batches)
        )
    except StudyError as error:
        why_not = str(error)
    grid = np.geomspace(law.batches.low, law.batches.high, CURVE)
    fitted = Fitted(
        name=_name(optimizer, target),
        runs=len(batches),
        status=law.status,
        remark=REMARKS[law.status],
        rms=law.residuals.rms,
        largest=law.residuals.largest,
        seed_noise=seed_noise([batches], steps),
        estimates=law_estimates(law, draws, asked.base),
        without_intervals=why,
        failed_resamples=draws.failed,
        held_out=held_out,
        without_held_out=why_not,
        measured_x=tuple(batches.tolist()),
        measured_y=tuple(steps.tolist()),
        curve=curve(draws, grid, lambda theta: batch.log_steps(theta, np.log(grid))),
    )
    return _Group(
        optimizer=optimizer, target=target, fitted=fitted, draws=draws, batches=law.batches
    )


def law_estimates(
    law: batch.BatchLaw, draws: Draws, base: float | None = None
) -> tuple[Estimate, ...]:
    """Return Smin, Emin and the critical batch sizes with their intervals.

    Args:
        law: the fit.
        draws: of it.
        base: batch that the 20 % overhead is counted from; the smallest one when not given.
    """
    base = base or law.batches.low
    overhead = law.with_overhead(base)
    return (
        estimate("Smin", draws, lambda theta: theta[..., 0], log=True),
        estimate("Emin", draws, lambda theta: theta[..., 1], log=True),
        estimate(
            "critical batch Emin/Smin",
            draws,
            lambda theta: theta[..., 1] - theta[..., 0],
            law.critical.extrapolated,
            log=True,
        ),
        estimate(
            f"batch with 20 % more data than {number(base)}",
            draws,
            lambda theta: batch.log_overhead_batch(theta, base),
            overhead.extrapolated,
            log=True,
        ),
    )


def _ratios(groups: list[_Group], reference: str | None) -> list[Ratio]:
    """Compare, of each target, every optimizer with the reference."""
    optimizers = list(dict.fromkeys(group.optimizer for group in groups))
    base = baseline(optimizers, reference)
    found = {(group.optimizer, group.target): group for group in groups}
    return [
        _ratio(found[base, group.target], group)
        for group in groups
        if group.optimizer != base and (base, group.target) in found
    ]


def _ratio(base: _Group, other: _Group) -> Ratio:
    joined, split_at = join(base.draws, other.draws), len(base.draws.estimate)

    def log_ratio(size: float) -> Callable[[FloatArray], FloatArray]:
        log_b = np.log(size)

        def quantity(theta: FloatArray) -> FloatArray:
            first = batch.log_steps(theta[..., :split_at], log_b)
            return first - batch.log_steps(theta[..., split_at:], log_b)

        return quantity

    low = max(base.batches.low, other.batches.low)
    high = min(base.batches.high, other.batches.high)
    if not low < high:
        low, high = base.batches.low, base.batches.high
    places = np.geomspace(low, high, ROWS).tolist()
    rows = []
    for size in places:
        outside = not (base.batches.holds(size) and other.batches.holds(size))
        rows.append(estimate(number(size), joined, log_ratio(size), outside, log=True))
    return Ratio(
        first=base.name,
        second=other.name,
        what="tokens to the target at equal batch size",
        at="batch size",
        places=tuple(places),
        rows=tuple(rows),
    )


def _name(optimizer: str, target: str) -> str:
    return f"{optimizer} to {target}".strip() if target else optimizer
