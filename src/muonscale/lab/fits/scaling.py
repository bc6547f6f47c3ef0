"""From a table of runs to scaling laws: of each group, and of groups against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from muonscale.errors import ConfigError, StudyError, nearest
from muonscale.lab.fits import allocation
from muonscale.lab.fits.bootstrap import LEVEL, Draws, Seed
from muonscale.lab.fits.checks import positive
from muonscale.lab.fits.findings import (
    REMARKS,
    Estimate,
    Findings,
    Fitted,
    curve,
    estimate,
    number,
)
from muonscale.lab.fits.flops_ratio import Frontier, flops_ratio
from muonscale.lab.fits.groups import baseline, labelled, split
from muonscale.lab.fits.laws import chinchilla, power
from muonscale.lab.fits.leave_out import HeldOut, leave_rungs_out
from muonscale.lab.fits.noise import seed_noise
from muonscale.lab.fits.result import FloatArray, Residuals, Span
from muonscale.lab.fits.status import FitStatus
from muonscale.lab.fits.tables import RunTable

LAWS = ("auto", "compute", "chinchilla")
CURVE = 60
BEYOND = 10
"""Where a law is asked besides the largest run: so many times its FLOPs."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to make of a table."""

    law: str = "auto"
    """auto, compute or chinchilla."""
    by: str | None = None
    """Column of the groups; the table's optimizer column when not given."""
    reference: str | None = None
    """Group that the others are compared with."""
    at: tuple[float, ...] = ()
    """FLOPs to predict at."""
    resamples: int = 1000
    seed: int = 0
    level: float = LEVEL


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The runs of one group, and its law."""

    draws: Draws
    without_intervals: str
    status: FitStatus
    residuals: Residuals
    estimates: tuple[Estimate, ...]
    held_out: Callable[[], tuple[HeldOut, ...]]
    noise: float | None
    frontier: Frontier
    flops: FloatArray
    loss: FloatArray


def fit_scaling(table: RunTable, asked: Asked) -> Findings:
    """Fit a scaling law to each group of a table, and compare the groups.

    Raises:
        ConfigError: for an unknown law.
        StudyError: for a table that lacks a column, or a group that its law cannot be fitted to.
    """
    positive(at=asked.at)
    law = _law(table, asked.law)
    column = asked.by or table.name("optimizer")
    fit = _fit_chinchilla if law == "chinchilla" else _fit_compute
    groups: dict[str, _Group] = {}
    for place, (name, rows) in enumerate(split(table, column).items()):
        try:
            # Groups are drawn independently of each other.
            groups[name] = fit(rows, asked, (asked.seed, place))
        except StudyError as error:
            raise labelled(name, error) from error
    reference = baseline(list(groups), asked.reference)
    others = [name for name in groups if name != reference]
    return Findings(
        source=str(table.path),
        law=chinchilla.NAME if law == "chinchilla" else power.NAME,
        level=asked.level,
        resamples=asked.resamples,
        seed=asked.seed,
        rung=_rung(table, law),
        x_label="FLOPs",
        y_label="loss",
        fits=tuple(_fitted(name, group) for name, group in groups.items()),
        ratios=tuple(
            flops_ratio(
                name, groups[name].frontier, reference, groups[reference].frontier, asked.at
            )
            for name in others
        ),
        notes=_notes(table, law),
    )


def _law(table: RunTable, asked: str) -> str:
    if asked not in LAWS:
        raise ConfigError(f"law={asked!r}; {nearest(asked, LAWS)}")
    if asked != "auto":
        return asked
    return "chinchilla" if table.name("parameters") and table.name("tokens") else "compute"


def _flops(table: RunTable) -> FloatArray:
    """Return C of each run: its column, else 6 N D."""
    if table.name("flops") or not (table.name("parameters") and table.name("tokens")):
        return table.numbers("flops")
    return allocation.FLOPS * table.numbers("parameters") * table.numbers("tokens")


def _notes(table: RunTable, law: str) -> tuple[str, ...]:
    notes = []
    if law == "compute" and not table.name("flops"):
        notes.append("FLOPs are 6 x parameters x tokens: the table has no column of FLOPs.")
    if law == "chinchilla":
        notes.append(
            "Best N and D are for C = 6 N D; a curve of the loss is the lowest for each C."
        )
    return tuple(notes)


def _rung(table: RunTable, law: str) -> str:
    return table.name("rung") or ("N" if law == "chinchilla" else "C")


def _drawn(draw: Callable[[], Draws], theta: FloatArray, level: float) -> tuple[Draws, str]:
    """Return the draws of a law, or none and the reason."""
    try:
        return draw(), ""
    except StudyError as error:
        return Draws.none(theta, level), str(error)


def _fit_compute(table: RunTable, asked: Asked, seed: Seed) -> _Group:
    flops, loss = _flops(table), table.numbers("loss")
    law = power.fit_power(flops, loss)
    draws, why = _drawn(
        lambda: power.draw_power(flops, loss, asked.resamples, seed, asked.level),
        law.theta,
        asked.level,
    )
    estimates = [
        estimate("a", draws, lambda theta: theta[..., 0], log=True),
        estimate("b", draws, lambda theta: theta[..., 1]),
    ]
    for place in _places(law.sizes, asked):
        outside = not law.sizes.holds(place)
        name = f"loss at C = {number(place)}"
        estimates.append(estimate(name, draws, _at(power.log_loss, place), outside, log=True))
    rungs = table.numbers("rung") if table.name("rung") else flops
    return _Group(
        draws=draws,
        without_intervals=why,
        status=law.status,
        residuals=law.residuals,
        estimates=tuple(estimates),
        held_out=lambda: leave_rungs_out(
            rungs, loss, lambda kept: power.fit_power(flops[kept], loss[kept])(flops)
        ),
        noise=seed_noise([flops], loss),
        frontier=Frontier(
            draws=draws, flops=law.sizes, log_loss=power.log_loss, log_reach=power.log_reach
        ),
        flops=flops,
        loss=loss,
    )


def _fit_chinchilla(table: RunTable, asked: Asked, seed: Seed) -> _Group:
    n, d, loss = (table.numbers(what) for what in ("parameters", "tokens", "loss"))
    law = chinchilla.fit_chinchilla(n, d, loss)
    draws, why = _drawn(
        lambda: chinchilla.draw_chinchilla(law, n, d, loss, asked.resamples, seed, asked.level),
        law.theta,
        asked.level,
    )
    names = ("A", "B", "E", "alpha", "beta")
    estimates = [
        estimate(name, draws, lambda theta, i=i: theta[..., i], log=i < 3)
        for i, name in enumerate(names)
    ]
    flops = allocation.FLOPS * n * d
    for place in _places(Span.of(flops), asked):
        estimates += _allocated(law, draws, place)
    rungs = table.numbers("rung") if table.name("rung") else n
    return _Group(
        draws=draws,
        without_intervals=why,
        status=law.status,
        residuals=law.residuals,
        estimates=tuple(estimates),
        held_out=lambda: leave_rungs_out(
            rungs,
            loss,
            lambda kept: chinchilla.fit_chinchilla(n[kept], d[kept], loss[kept])(n, d),
        ),
        noise=seed_noise([n, d], loss),
        frontier=Frontier(
            draws=draws,
            flops=Span.of(flops),
            log_loss=allocation.log_best_loss,
            log_reach=allocation.log_reach,
            measured=lambda place: not allocation.allocate(law, place).loss.extrapolated,
        ),
        flops=flops,
        loss=loss,
    )


def _allocated(law: chinchilla.ChinchillaLaw, draws: Draws, flops: float) -> list[Estimate]:
    """Return the best N, D and loss for so many FLOPs."""
    found, at = allocation.allocate(law, flops), f"at C = {number(flops)}"
    rows = (
        (f"best N {at}", allocation.log_parameters, found.parameters),
        (f"best D {at}", allocation.log_tokens, found.tokens),
        (f"best loss {at}", allocation.log_best_loss, found.loss),
    )
    return [
        estimate(name, draws, _at(quantity, flops), said.extrapolated, log=True)
        for name, quantity, said in rows
    ]


def _places(flops: Span, asked: Asked) -> tuple[float, ...]:
    return asked.at or (flops.high, BEYOND * flops.high)


def _at(
    quantity: Callable[[FloatArray, float], FloatArray], flops: float
) -> Callable[[FloatArray], FloatArray]:
    return lambda theta: quantity(theta, flops)


def _fitted(name: str, group: _Group) -> Fitted:
    try:
        held_out, why = group.held_out(), ""
    except StudyError as error:
        held_out, why = (), str(error)
    x = np.geomspace(group.flops.min(), group.flops.max(), CURVE)
    frontier = group.frontier
    return Fitted(
        name=name,
        runs=len(group.loss),
        status=group.status,
        remark=REMARKS[group.status],
        rms=group.residuals.rms,
        largest=group.residuals.largest,
        seed_noise=group.noise,
        estimates=group.estimates,
        without_intervals=group.without_intervals,
        failed_resamples=group.draws.failed,
        held_out=held_out,
        without_held_out=why,
        measured_x=tuple(group.flops.tolist()),
        measured_y=tuple(group.loss.tolist()),
        curve=curve(
            group.draws,
            x,
            lambda theta: np.stack([frontier.log_loss(theta, c) for c in x], axis=-1),
        ),
    )
