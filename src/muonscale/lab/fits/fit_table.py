"""From a table of runs to laws: one for each group, and the groups compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from muonscale.errors import ConfigError, StudyError, nearest
from muonscale.lab.fits.bootstrap import CONFIDENCE, Draws, Seed
from muonscale.lab.fits.findings import Findings, Fitted, trace_curve
from muonscale.lab.fits.laws.base import Law
from muonscale.lab.fits.laws.registry import LAWS
from muonscale.lab.fits.leave_out import RUNG_WIDTH, leave_rungs_out
from muonscale.lab.fits.ratios import DrawnLaw, compare_flops, compare_tokens
from muonscale.lab.fits.statistics import estimate_seed_noise
from muonscale.lab.fits.tables import DERIVED, RunTable, choose_baseline

AUTO = "auto"
CURVE = 60
"""Points of the curve of a law."""


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """How to fit a table."""

    measured: str = "loss"
    """What the law predicts: loss, by FLOPs, or steps, by batch size."""
    law: str = AUTO
    """A key of `LAWS`, or auto."""
    by: str | None = None
    """Column whose values are the groups; by default the optimizer column of the table."""
    reference: str | None = None
    """Group that the others are compared with; see `choose_baseline`."""
    at: tuple[float, ...] = ()
    """FLOPs to predict at besides the default ones, or batch sizes from which 20 % more data is
    counted."""
    resamples: int = 1000
    seed: int = 0
    level: float = CONFIDENCE


def fit_table(table: RunTable, request: FitRequest) -> Findings:
    """Fit a law to each group of a table, and compare the groups with the baseline.

    Laws of the steps are fitted to each target loss of a group.

    Raises:
        ConfigError: for an unknown law.
        StudyError: for a table that lacks a column, or a group to which the law cannot be fitted.
    """
    law = _choose_law(table, request)
    for place in request.at:
        if not (math.isfinite(place) and place > 0):
            raise StudyError(
                f"the law cannot be evaluated at {law.X_LABEL} {place:g}; it must be positive and "
                "finite"
            )
    target_column = table.name("target") if law.MEASURED == "steps" else None
    groups: dict[tuple[str, str], tuple[DrawnLaw, Fitted]] = {}
    for optimizer, rows in table.split(request.by or table.name("optimizer")).items():
        for target, runs in rows.split(target_column).items():
            name = f"{optimizer} to {target}".strip() if target else optimizer
            try:
                # The groups need independent draws.
                seed = (request.seed, len(groups))
                groups[optimizer, target] = _fit_group(name, law, runs, request, seed)
            except StudyError as error:
                raise StudyError(f"{name}: {error}" if name else str(error)) from error

    base = choose_baseline([optimizer for optimizer, _ in groups], request.reference)
    ratios = []
    for (optimizer, target), (group, _) in groups.items():
        if optimizer != base and (base, target) in groups:
            reference, _ = groups[base, target]
            if law.MEASURED == "loss":
                ratios.append(compare_flops(group, reference, request.at))
            else:
                ratios.append(compare_tokens(reference, group))
    notes = [law.NOTE] if law.NOTE else []
    notes += [
        DERIVED[column][-1]
        for column in (*law.COLUMNS, law.MEASURED)
        if column in DERIVED and not table.name(column)
    ]
    return Findings(
        source=str(table.path),
        law=law.FORMULA,
        level=request.level,
        resamples=request.resamples,
        seed=request.seed,
        rung=table.name("rung") or law.SIZE,
        x_label=law.X_LABEL,
        y_label=law.Y_LABEL,
        fits=tuple(fitted for _, fitted in groups.values()),
        ratios=tuple(ratios),
        notes=tuple(notes),
    )


def _choose_law(table: RunTable, request: FitRequest) -> type[Law]:
    """Return the law of that name; for auto the first that the table has the columns of."""
    laws = {name: law for name, law in LAWS.items() if request.measured == law.MEASURED}
    if request.law == AUTO:
        for law in laws.values():
            if all(map(table.name, law.COLUMNS)):
                return law
        return min(laws.values(), key=lambda law: len(law.COLUMNS))
    if request.law not in laws:
        raise ConfigError(f"law={request.law!r}; {nearest(request.law, [AUTO, *laws])}")
    return laws[request.law]


def _fit_group(
    name: str, law_type: type[Law], table: RunTable, request: FitRequest, seed: Seed
) -> tuple[DrawnLaw, Fitted]:
    x = [table.numbers(column) for column in law_type.COLUMNS]
    y = table.numbers(law_type.MEASURED)
    law = law_type.fit(*x, y)
    draws, without_intervals = Draws.none(law.theta, request.level), ""
    try:
        draws = law.draw(request.resamples, seed, request.level)
    except StudyError as error:
        without_intervals = str(error)

    by_column = table.name("rung") is not None
    rungs, width = (table.numbers("rung"), 0.0) if by_column else (x[0], RUNG_WIDTH)
    left_out, none_left_out = (), ""
    try:
        left_out = leave_rungs_out(
            rungs,
            y,
            lambda kept: law_type.fit(*(sizes[kept] for sizes in x), y[kept])(*x),
            width,
        )
    except StudyError as error:
        none_left_out = str(error)

    ends = [law.places.min(), law.places.max()]
    wanted = request.at if law.MEASURED == "loss" else ()
    grid = np.union1d(np.geomspace(min(*ends, *wanted), max(*ends, *wanted), CURVE), ends)
    curve = trace_curve(
        draws, grid, lambda theta: np.stack([law.log_value(theta, at) for at in grid], axis=-1)
    )
    fitted = Fitted(
        name=name,
        runs=len(y),
        status=law.status,
        remark=law.remark,
        rms=law.residuals.rms,
        largest=law.residuals.largest,
        seed_noise=estimate_seed_noise(x, y),
        estimates=law.estimates(draws, request.at),
        without_intervals=without_intervals,
        failed_resamples=draws.failed,
        left_out=left_out,
        none_left_out=none_left_out,
        measured_x=tuple(law.places.tolist()),
        measured_y=tuple(y.tolist()),
        curve=curve if law.is_determined else None,
    )
    return DrawnLaw(name=name, law=law, draws=draws), fitted
