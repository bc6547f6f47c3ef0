"""What a ladder says: the best settings of every rung, the laws, and operations at equal loss."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import join
from muonscale.lab.fits.findings import Findings, FitRatio
from muonscale.lab.fits.fit_table import FitRequest, fit_table
from muonscale.lab.fits.laws.power import PowerLaw
from muonscale.lab.fits.result import Interval
from muonscale.lab.fits.tables import RunTable
from muonscale.lab.studies.analysis.seed_blocks import fit_blocks

if TYPE_CHECKING:
    from muonscale.lab.estimate.run_cost import RunCost
    from muonscale.lab.studies.scaling.study import Scaling
    from muonscale.lab.studies.study import Outcomes

PAPER_RATIO = 0.519
"""FLOPs of Muon over those of AdamW at equal loss (Moonlight, section 3.4)."""
TABLE = Path("ladder")
"""What messages call the table of runs."""
PFLOPS_DAY = 8.64e19
MUON_LAW, ADAMW_LAW = (2.506, 0.052), (2.608, 0.054)
"""a and b of L = a C^-b, C in PFLOP/s-days (Moonlight, table 3)."""
PAPER_RUNS = (2.1e19, 3.5e20)
"""6 N D of the smallest and the largest model that they were fitted to (Moonlight, table 2)."""


class Setting(NamedTuple):
    """What is chosen on a rung."""

    lr: float
    batch: int | None
    """Tokens of a step; None for the recipe's."""


@dataclass(frozen=True)
class Search:
    """The settings that were tried on a rung."""

    losses: Mapping[Setting, Mapping[int, float]]
    """By seed; infinite where a run diverged."""
    ended: bool

    @property
    def best(self) -> Setting | None:
        """The setting with the lowest mean loss, of those that have all seeds."""
        most = max((len(each) for each in self.losses.values()), default=0)
        means = {
            setting: statistics.fmean(each.values())
            for setting, each in self.losses.items()
            if each and len(each) == most
        }
        finite = {setting: mean for setting, mean in means.items() if math.isfinite(mean)}
        return min(finite, key=lambda setting: finite[setting], default=None)

    @property
    def edges(self) -> list[str]:
        """Where the best setting is the lowest or the highest that was tried: `lr low`."""
        if (best := self.best) is None:
            return []
        found = []
        for name in Setting._fields:
            values = sorted({getattr(s, name) for s in self.losses if getattr(s, name) is not None})
            value = getattr(best, name)
            if len(values) > 1 and value in (values[0], values[-1]):
                found.append(f"{name} {'low' if value == values[0] else 'high'}")
        return found


@dataclass(frozen=True)
class Measured:
    """Runs of one optimizer, on one rung, of one length."""

    variant: str
    rung: str
    setting: Setting
    main: bool
    """Whether it has the rung's own length, which the law of C takes."""
    cost: RunCost
    losses: Mapping[int, float]
    """By seed; infinite where a run diverged."""


def six_n_d(parameters: Callable[[RunCost], int]) -> Callable[[RunCost], float]:
    """Return C = 6 N D of a run, for a way to count N."""
    return lambda cost: 6.0 * parameters(cost) * cost.tokens


COUNTS: dict[str, Callable[[RunCost], float]] = {
    "counted": lambda cost: float(cost.flops),
    "6ND": six_n_d(lambda cost: cost.without_embeddings),
    "6ND-embeddings": six_n_d(lambda cost: cost.parameters),
}
"""Ways to count C of a run: every product, Newton-Schulz included; 6 N D without and with embeddings."""
PARAMETERS: dict[str, Callable[[RunCost], float]] = {
    "without-embeddings": lambda cost: float(cost.without_embeddings),
    "with-embeddings": lambda cost: float(cost.parameters),
}
"""Ways to count N."""


@dataclass(frozen=True)
class Laws:
    """The laws of a ladder; of one that cannot be fitted, the reason."""

    compute: Mapping[str, Findings | str]
    """By way of counting C."""
    chinchilla: Mapping[str, Findings | str]
    """By way of counting N."""


def rungs_of(study: Scaling, outcomes: Outcomes) -> list[Measured]:
    """Return everything that was measured, in the order of the ladder."""
    return [
        measured
        for variant in study.config.variants
        for place in range(len(study.names))
        for measured in study.measured(outcomes, variant, place)
    ]


def laws_of(study: Scaling, measured: list[Measured], effects: Mapping[int, float]) -> Laws:
    """Fit the laws to what was measured; `effects` are those of `seed_effects`."""
    main, config = [m for m in measured if m.main], study.config
    asked = FitRequest(law="compute", reference=config.baseline, resamples=config.resamples)
    of_both = replace(asked, law="chinchilla")
    lengths = any(rung.other_tokens for rung in study.config.ladder)
    why = "rungs have one length each: N and D need other_tokens to be told apart"
    return Laws(
        {
            name: _fitted(table_of(main, effects, flops=count), asked)
            for name, count in COUNTS.items()
        },
        {
            name: _fitted(table_of(measured, effects, parameters=count), of_both)
            if lengths
            else why
            for name, count in PARAMETERS.items()
        },
    )


def _fitted(table: RunTable, asked: FitRequest) -> Findings | str:
    return _fit_columns(tuple(table.columns.items()), asked)


@lru_cache(maxsize=8)  # of result.json and of the report
def _fit_columns(
    columns: tuple[tuple[str, tuple[str, ...]], ...], asked: FitRequest
) -> Findings | str:
    table = RunTable(TABLE, dict(columns), tuple(range(1, len(columns[0][1]) + 1)))
    try:
        return fit_table(table, asked)
    except StudyError as error:
        return str(error)


def seed_effects(measured: list[Measured]) -> dict[int, float]:
    """Return what the log losses of all runs of a seed have in common; they sum to zero.

    Runs of one seed share the held-out split and the order of the data, on every rung and with every
    optimizer: the model is that of `muonscale.lab.studies.analysis.seed_blocks`, for log losses. Zero for all
    where it cannot be told.
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
    measured: list[Measured],
    effects: Mapping[int, float],
    **counts: Callable[[RunCost], float],
) -> RunTable:
    """Return runs as a table, a row for each seed, with the effects of seeds taken out of the losses.

    Args:
        measured: the runs; those that diverged are left out.
        effects: of `seed_effects`.
        counts: columns by what they hold, a key of `muonscale.lab.fits.tables.ALIASES`.
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


def found_in(study: Scaling, outcomes: Outcomes) -> dict[str, Any]:
    """Return everything that the study found, as plain values."""
    measured = rungs_of(study, outcomes)
    effects = seed_effects(measured)
    laws = laws_of(study, measured, effects)
    table = table_of([m for m in measured if m.main], effects, flops=COUNTS["counted"])
    return {
        "baseline": study.config.baseline,
        "stopped": _stopped(study, outcomes),
        "rungs": [_row(study, outcomes, m) for m in measured],
        "seed_effects": {str(seed): x for seed, x in effects.items()},
        "compute": {name: _plain(found) for name, found in laws.compute.items()},
        "chinchilla": {name: _plain(found) for name, found in laws.chinchilla.items()},
        "ratios": [
            _ratio(study, table, laws.compute["counted"], name)
            for name in study.config.variants
            if name != study.config.baseline
        ],
    }


def _stopped(study: Scaling, outcomes: Outcomes) -> str | None:
    """Return why a rung has nothing to measure: every setting of its search failed or diverged."""
    for variant in study.config.variants:
        for place, name in enumerate(study.names):
            search = study.search(outcomes, variant, place)
            if search.losses and search.ended and search.best is None:
                return f"{variant} on rung {name}: no setting of the search has a loss"
    return None


def _plain(found: Findings | str) -> dict[str, Any]:
    return {"why": found} if isinstance(found, str) else json.loads(found.json())


def _row(study: Scaling, outcomes: Outcomes, m: Measured) -> dict[str, Any]:
    search = study.search(outcomes, m.variant, study.names.index(m.rung))
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
        "lr": m.setting.lr,
        "batch": m.setting.batch,
        "edges": search.edges,
        "losses": {str(seed): loss for seed, loss in m.losses.items()},
        "tried": [
            {"lr": s.lr, "batch": s.batch, "losses": {str(k): v for k, v in each.items()}}
            for s, each in search.losses.items()
        ],
    }


def _ratio(study: Scaling, table: RunTable, found: Findings | str, name: str) -> dict[str, Any]:
    """Return how an optimizer's operations compare with the baseline's, and which way that goes."""
    empty = {"variant": name, "rows": [], "trend": None, "why": ""}
    if isinstance(found, str):
        return empty | {"why": found}
    trend = ratio_trend(table, name, study.config.baseline, study.config.resamples)
    rows = [row for ratio in found.ratios if ratio.first == name for row in _rows(ratio)]
    return empty | {"rows": rows, "trend": trend._asdict() if trend else None}


def _rows(ratio: FitRatio) -> list[dict[str, Any]]:
    return [
        {
            "flops": place,
            "ratio": row.value,
            "low": row.low,
            "high": row.high,
            "extrapolated": row.extrapolated,
        }
        for place, row in zip(ratio.places, ratio.rows, strict=True)
    ]


class Trend(NamedTuple):
    """Slope of log ratio over log C of the baseline: above zero where the advantage narrows."""

    value: float
    low: float
    high: float


def ratio_trend(table: RunTable, name: str, baseline: str, resamples: int = 1000) -> Trend | None:
    """Return how the ratio of operations at equal loss changes with C, None without intervals.

    With laws L = a C^-b, log C_M = (b_A log C_A + log a_M - log a_A) / b_M: the slope is b_A/b_M - 1.
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
    """Return Moonlight's ratio at so many FLOPs of AdamW, by its laws (table 3)."""
    (a_muon, b_muon), (a_adamw, b_adamw) = MUON_LAW, ADAMW_LAW
    loss = a_adamw * (flops / PFLOPS_DAY) ** -b_adamw
    return (a_muon / loss) ** (1 / b_muon) * PFLOPS_DAY / flops
