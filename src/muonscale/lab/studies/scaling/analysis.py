"""The measured ladder: best settings of every rung, the laws, and FLOPs at equal loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from muonscale.errors import StudyError
from muonscale.lab.files import drop_nonfinite
from muonscale.lab.fits.bootstrap import join
from muonscale.lab.fits.findings import Findings
from muonscale.lab.fits.fit_table import FitRequest, fit_table
from muonscale.lab.fits.laws.power import PowerLaw
from muonscale.lab.fits.result import Interval
from muonscale.lab.fits.tables import RunTable
from muonscale.lab.fits.text import describe_undetermined
from muonscale.lab.studies.analysis.seed_blocks import fit_blocks
from muonscale.lab.studies.scaling.config import ScalingConfig
from muonscale.lab.studies.scaling.ladder import MeasuredRung

if TYPE_CHECKING:
    from muonscale.lab.estimate.run_cost import RunCost

PAPER_RATIO = 0.519
"""FLOPs of Muon over those of AdamW at equal loss (Moonlight, section 3.4)."""
TABLE = Path("ladder")
"""Name of the table of runs in messages."""
PFLOPS_DAY = 8.64e19
MUON_LAW, ADAMW_LAW = (2.506, 0.052), (2.608, 0.054)
"""a and b of L = a C^-b, C in PFLOP/s-days (Moonlight, table 3)."""
PAPER_RUNS = (2.1e19, 3.5e20)
"""6 N D of the smallest and the largest model of that fit (Moonlight, table 2)."""


COUNTS: dict[str, Callable[[RunCost], float]] = {
    "counted": lambda cost: float(cost.flops),
    "6ND": lambda cost: 6.0 * cost.without_embeddings * cost.tokens,
    "6ND-embeddings": lambda cost: 6.0 * cost.parameters * cost.tokens,
}
"""Ways to count C of a run: every product, Newton-Schulz included; 6 N D without and with
embeddings."""
PARAMETERS: dict[str, Callable[[RunCost], float]] = {
    "without-embeddings": lambda cost: float(cost.without_embeddings),
    "with-embeddings": lambda cost: float(cost.parameters),
}
"""Ways to count N."""


NOTHING_SEARCHED: dict[str, Any] = {"points": [], "best": None, "tuned": True, "edges": []}


@dataclass(frozen=True)
class LadderLaws:
    """The laws of a ladder, or the reason why one cannot be fitted."""

    compute: Mapping[str, Findings | str]
    """L = a C^-b by way of counting C."""
    chinchilla: Mapping[str, Findings | str]
    """L(N, D) by way of counting N."""


def fit_laws(
    config: ScalingConfig, measured: list[MeasuredRung], effects: Mapping[int, float]
) -> LadderLaws:
    """Fit the laws to measured runs."""
    main = [m for m in measured if m.main]
    by_compute = FitRequest(law="compute", reference=config.baseline, resamples=config.resamples)
    by_sizes = replace(by_compute, law="chinchilla")
    compute = {
        name: _fit(table_of(main, effects, flops=count), by_compute)
        for name, count in COUNTS.items()
    }
    if any(rung.other_tokens for rung in config.ladder):
        chinchilla = {
            name: _fit(table_of(measured, effects, parameters=count), by_sizes)
            for name, count in PARAMETERS.items()
        }
    else:
        why = "rungs have one length each; other_tokens are needed to separate N from D"
        chinchilla = dict.fromkeys(PARAMETERS, why)
    return LadderLaws(compute, chinchilla)


def _fit(table: RunTable, request: FitRequest) -> Findings | str:
    return _fit_columns(tuple(table.columns.items()), request)


@lru_cache(maxsize=8)  # result.json and the report need the same fits
def _fit_columns(
    columns: tuple[tuple[str, tuple[str, ...]], ...], request: FitRequest
) -> Findings | str:
    table = RunTable(TABLE, dict(columns), tuple(range(1, len(columns[0][1]) + 1)))
    try:
        return fit_table(table, request)
    except StudyError as error:
        return str(error)


def seed_effects(measured: list[MeasuredRung]) -> dict[int, float]:
    """Return the effect of each seed on the log losses of all its runs; the effects sum to zero.

    Runs of one seed share the validation split and the order of the data, on every rung and with
    every optimizer: the model is that of `muonscale.lab.studies.analysis.seed_blocks`, for log
    losses. All effects are zero where they cannot be estimated.
    """
    logs = {
        (m.variant, m.rung, m.cost.tokens): {
            seed: math.log(loss) for seed, loss in m.losses.items() if math.isfinite(loss)
        }
        for m in measured
    }
    seeds = {seed for each in logs.values() for seed in each}
    try:
        blocks = fit_blocks(logs)
    except StudyError:
        return dict.fromkeys(seeds, 0.0)
    means = dict(zip(blocks.groups, blocks.means, strict=True))
    # Least squares leave the residuals of every seed with a mean of zero.
    return {
        seed: statistics.fmean(
            each[seed] - means[group] for group, each in logs.items() if seed in each
        )
        for seed in seeds
    }


def table_of(
    measured: list[MeasuredRung],
    effects: Mapping[int, float],
    **counts: Callable[[RunCost], float],
) -> RunTable:
    """Return runs as a table, a row per seed, with the effects of seeds removed from losses.

    Args:
        measured: the runs; those that diverged are left out.
        effects: what `seed_effects` returns.
        counts: columns by name, a key of `muonscale.lab.fits.tables.ALIASES`.
    """
    rows = [
        (m, loss * math.exp(-effects[seed]))
        for m in measured
        for seed, loss in m.losses.items()
        if math.isfinite(loss)
    ]
    columns = {
        "optimizer": tuple(m.variant for m, _ in rows),
        "tokens": tuple(str(m.cost.tokens) for m, _ in rows),
        **{name: tuple(repr(count(m.cost)) for m, _ in rows) for name, count in counts.items()},
        "loss": tuple(repr(loss) for _, loss in rows),
    }
    return RunTable(TABLE, columns, tuple(range(1, len(rows) + 1)))


def analyze_ladder(
    config: ScalingConfig, measured: list[MeasuredRung], stopped: str | None
) -> dict[str, Any]:
    """Return the findings of the study, as plain values.

    Args:
        config: of the study.
        measured: measured runs, in the order of the ladder.
        stopped: why the study cannot continue, if so.
    """
    effects = seed_effects(measured)
    laws = fit_laws(config, measured, effects)
    table = table_of([m for m in measured if m.main], effects, flops=COUNTS["counted"])
    counted, base = laws.compute["counted"], config.baseline
    ratios = []
    for name in config.variants:
        if name == base:
            continue
        ratio: dict[str, Any] = {"variant": name, "rows": [], "trend": None, "why": ""}
        ratio["not_tuned"] = [
            f"{m.variant} {m.rung}"
            for m in measured
            if m.main and m.variant in (name, base) and not m.tuned
        ]
        if isinstance(counted, str):
            ratio["why"] = counted
        else:
            undetermined = [
                describe_undetermined(each) for each in counted.ratios if each.first == name
            ]
            ratio["why"] = "".join(undetermined)
            trend = ratio_trend(table, name, base, config.resamples)
            ratio["trend"] = trend._asdict() if trend else None
            ratio["rows"] = [
                {
                    "flops": place,
                    "ratio": row.value,
                    "low": row.low,
                    "high": row.high,
                    "extrapolated": row.extrapolated,
                }
                for each in counted.ratios
                if each.first == name and not each.undetermined
                for place, row in zip(each.places, each.rows, strict=True)
            ]
        ratios.append(ratio)

    def plain(law: Findings | str) -> dict[str, Any]:
        return {"why": law} if isinstance(law, str) else drop_nonfinite(asdict(law))

    return {
        "baseline": base,
        "stopped": stopped,
        "rungs": [_row(m) for m in measured],
        "seed_effects": {str(seed): x for seed, x in effects.items()},
        "compute": {name: plain(law) for name, law in laws.compute.items()},
        "chinchilla": {name: plain(law) for name, law in laws.chinchilla.items()},
        "ratios": ratios,
    }


def _row(m: MeasuredRung) -> dict[str, Any]:
    return {
        "variant": m.variant,
        "rung": m.rung,
        "main": m.main,
        "parameters": m.cost.parameters,
        "without_embeddings": m.cost.without_embeddings,
        "tokens": m.cost.tokens,
        "steps": m.cost.steps,
        "flops": m.cost.flops,
        "newton_schulz": m.cost.steps * m.cost.newton_schulz_flops / m.cost.flops,
        "losses": {str(seed): loss for seed, loss in m.losses.items()},
        "values": dict(m.values),
        **(NOTHING_SEARCHED if m.search is None else m.search.tree()),
    }


class Trend(NamedTuple):
    """Slope of log ratio over log C of the baseline: above zero if the advantage narrows."""

    value: float
    low: float
    high: float


def ratio_trend(table: RunTable, name: str, baseline: str, resamples: int = 1000) -> Trend | None:
    """Return how the ratio of FLOPs at equal loss changes with C, None without intervals.

    With laws L = a C^-b, log C_M = (b_A log C_A + log a_M - log a_A) / b_M: the slope is b_A/b_M -
    1.
    """
    labels = table.labels("optimizer")
    draws = []
    for place, group in enumerate((name, baseline)):
        rows = [i for i, label in enumerate(labels) if label == group]
        flops, loss = (table.numbers(what)[rows] for what in ("flops", "loss"))
        try:
            draws.append(PowerLaw.fit(flops, loss).draw(resamples, (0, place)))
        except StudyError:
            return None
    joined = join(*draws)
    found: Interval = joined.interval(lambda theta: theta[..., 3] / theta[..., 1] - 1)
    return Trend(found.value, found.low, found.high)


def paper_ratio(flops: float) -> float:
    """Return Moonlight's ratio by its laws (table 3) at a number of FLOPs of AdamW."""
    (a_muon, b_muon), (a_adamw, b_adamw) = MUON_LAW, ADAMW_LAW
    loss = a_adamw * (flops / PFLOPS_DAY) ** -b_adamw
    return (a_muon / loss) ** (1 / b_muon) * PFLOPS_DAY / flops
