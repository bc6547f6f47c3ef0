"""The report of a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from muonscale.lab.report.page import (
    Block,
    Chart,
    Mark,
    Page,
    Section,
    Series,
    Table,
    Text,
    Verdict,
)
from muonscale.lab.studies.analysis.curves import MEASURES, Curve, mean_curve, read_curve
from muonscale.lab.studies.analysis.seed_blocks import CLAIM, LEVEL
from muonscale.lab.studies.report_blocks import (
    command_block,
    drawn,
    failures_section,
    versions_section,
)
from muonscale.lab.studies.study import Outcome, Outcomes
from muonscale.lab.studies.variants import VARIANTS

if TYPE_CHECKING:
    from muonscale.lab.studies.compare.study import CompareConfig

MEASURE_NAMES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}

UNITS = {
    "steps": "optimizer steps",
    "tokens": "training tokens",
    "flops": "FLOPs, Newton-Schulz included",
    "seconds": "seconds of training steps",
}


def compare_page(config: CompareConfig, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
    """Return the report of what `Compare.analyse` found."""
    sections = [_about(config)]
    for number, place in enumerate(found["places"]):
        sections.append(_place_section(config, place, outcomes, number))
    sections += [*failures_section(found), versions_section(outcomes)]
    names = list(config.variants)
    return Page(
        title=" against ".join(names) if len(names) <= 3 else f"{len(names)} optimizers compared",
        summary=f"{', '.join(names)}: {len(config.lr)} learning rates and {len(config.seeds)} seeds each, "
        "equal tokens.",
        sections=tuple(sections),
    )


def _about(config: CompareConfig) -> Section:
    rows = []
    for name, keys in config.variants.items():
        known = VARIANTS.get(name)
        own = ", ".join(f"{key}={value}" for key, value in keys.items())
        what = ", ".join(part for part in (known.what if known else "", own) if part)
        rates = ", ".join(f"{lr:g}" for lr in config.rates(name))
        rows.append((name, what, known.source if known else "", rates))
    confirm = (
        f" The best learning rate was run again with seeds {_listed(config.confirm_seeds)}, which chose "
        "nothing, and only these runs are compared."
        if config.confirm_seeds
        else " The best learning rate of each is picked by the same losses that are compared, in all "
        "variants alike."
    )
    return Section(
        title="What was compared",
        blocks=(
            command_block(config),
            Table(head=("variant", "what it is", "source", "learning rates"), rows=tuple(rows)),
            Text(
                f"Every variant has as many learning rates, the same seeds ({_listed(config.seeds)}) and the "
                f"same tokens.{confirm}"
            ),
            Text(
                f"Intervals are {LEVEL:.0%}. Runs of one seed share initial weights, order of the data and "
                "held-out split, so differences are taken seed by seed; one noise is estimated from all "
                "compared learning rates. A variant is called better if the one-sided p-value, adjusted for "
                f"the number of comparisons (Holm), is below {CLAIM:g}; likely better if only the interval "
                "lies below zero."
            ),
        ),
    )


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _place_section(
    config: CompareConfig, place: Mapping[str, Any], outcomes: Outcomes, number: int
) -> Section:
    name = ", ".join(f"{key} {value}" for key, value in place["place"].items())
    blocks: list[Block] = [*_verdicts(place, config.baselines), _loss_table(place, number)]
    blocks += [_comparison_table(place, number), *drawn(_lr_chart(place, number))]
    blocks += _reach_tables(config, place, number)
    blocks += _curve_charts(config, place, outcomes, number)
    return Section(title=name or "Result", blocks=tuple(blocks))


def _verdicts(place: Mapping[str, Any], baselines: list[str]) -> list[Block]:
    blocks: list[Block] = [Text(note) for note in place["notes"]]
    edges = [v for v in place["variants"] if v["edge"]]
    for variant in edges:
        end = {"low": "lowest", "high": "highest"}[variant["edge"]]
        blocks.append(
            Text(
                f"The best learning rate of {variant['name']}, {variant['best_lr']:g}, is the {end} that was "
                "tried: a lower loss may lie beyond, and what is said of it may change."
            )
        )
    for c in place["comparisons"]:
        if {c["better"], c["worse"]} & set(baselines):
            blocks.append(_verdict(c))
    return blocks


def _verdict(c: Mapping[str, Any]) -> Verdict:
    numbers = (
        f"{c['difference']:+.4f} nats ({_interval(c)}), one-sided p {_p(c['p'])}, adjusted "
        f"{_p(c['p_adjusted'])}"
    )
    if c["verdict"] == "not told apart":
        return Verdict(None, f"{c['better']} and {c['worse']}: {numbers}")
    return Verdict(True, f"{c['better']} is {c['verdict']} than {c['worse']}: {numbers}")


def _interval(c: Mapping[str, Any]) -> str:
    if c["low"] is None:
        return "no interval"
    return f"{LEVEL:.0%} {c['low']:+.4f} to {c['high']:+.4f}"


def _p(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _loss_table(place: Mapping[str, Any], number: int) -> Table:
    rows = []
    for v in sorted(place["variants"], key=lambda v: math.inf if v["loss"] is None else v["loss"]):
        ppl, low, high = v["perplexity"]
        rows.append(
            (
                v["name"],
                _number(v["best_lr"], "g"),
                v["edge"] or "",
                _number(v["loss"]),
                f"{_number(v['low'])} to {_number(v['high'])}",
                _number(ppl, ".2f"),
                f"{_number(low, '.2f')} to {_number(high, '.2f')}",
            )
        )
    return Table(
        name=f"losses-{number}",
        head=("variant", "best lr", "edge", "held-out loss", "interval", "perplexity", "interval"),
        rows=tuple(rows),
        caption="Held out, nats per token, after the last step. These intervals hold the luck of the seed; "
        f"differences do not (noise {_number(place['sigma'])} nats, {place['freedom']} degrees of freedom).",
    )


def _comparison_table(place: Mapping[str, Any], number: int) -> Table:
    rows = tuple(
        (
            c["better"],
            c["worse"],
            f"{c['difference']:+.4f}",
            _interval(c).removeprefix(f"{LEVEL:.0%} "),
            _p(c["p"]),
            _p(c["p_adjusted"]),
            c["verdict"],
        )
        for c in place["comparisons"]
    )
    head = ("lower", "than", "difference", "interval", "p", "p adjusted", "verdict")
    return Table(name=f"comparisons-{number}", head=head, rows=rows)


def _lr_chart(place: Mapping[str, Any], number: int) -> Chart:
    series = []
    for v in place["variants"]:
        points = [p for p in v["points"] if p["mean"] is not None]
        seeds = [[x for x in p["losses"].values() if x is not None] for p in points]
        series.append(
            Series(
                name=v["name"],
                x=tuple(p["lr"] for p in points),
                y=tuple(p["mean"] for p in points),
                low=tuple(min(each) for each in seeds),
                high=tuple(max(each) for each in seeds),
                kind="both",
            )
        )
    return Chart(
        name=f"learning-rates-{number}",
        title="Loss by learning rate",
        x_label="learning rate",
        y_label="held-out loss (nats per token)",
        log_x=True,
        series=tuple(series),
        caption="Mean over seeds; the bars reach from the lowest to the highest. Learning rates at which a "
        "run diverged have no point.",
    )


def _reach_tables(config: CompareConfig, place: Mapping[str, Any], number: int) -> Iterator[Block]:
    for name in config.baselines:
        whole = next(v for v in place["variants"] if v["name"] == name)["reach"].get(name)
        if whole is None:
            continue
        rows = []
        for v in place["variants"]:
            reached = v["reach"].get(name, {})
            cells = [_spent(reached.get(measure), whole[measure]["end"]) for measure in MEASURES]
            rows.append((v["name"], *cells))
        yield Table(
            name=f"to-{name}-{number}",
            head=(f"to {name}'s loss", *(UNITS[measure] for measure in MEASURES)),
            rows=tuple(rows),
            caption=f"What is spent until the mean curve has the final loss of {name}, and in brackets its "
            "part of what that one spent. All runs have the schedule of a whole run: one planned shorter "
            "would be lower earlier. With > it was not reached by the end, with < it was at the first "
            "evaluation.",
        )


def _spent(r: Mapping[str, Any] | None, whole: float | None) -> str:
    if r is None or r["amount"] is None or whole is None:
        return "-"
    part = "" if r["censored"] else f" ({r['amount'] / whole:.2f})"
    return f"{r['censored']} {r['amount']:.4g}{part}".strip()


def _curve_charts(
    config: CompareConfig, place: Mapping[str, Any], outcomes: Outcomes, number: int
) -> list[Block]:
    curves = {}
    for v in place["variants"]:
        runs = [o for o in outcomes.values() if _is_best(config, o, place, v)]
        if runs:
            curves[v["name"]] = mean_curve([read_curve(run) for run in runs])
    marks = tuple(
        Mark(axis="y", at=v["loss"], label=f"{v['name']} at the end")
        for v in place["variants"]
        if v["name"] in config.baselines and v["loss"] is not None
    )
    charts = [
        _curve_chart(measure, curves, marks, number) for measure in ("tokens", "flops", "seconds")
    ]
    return drawn(*charts)


def _curve_chart(
    measure: str, curves: Mapping[str, Curve], marks: tuple[Mark, ...], number: int
) -> Chart:
    known = {name: c for name, c in curves.items() if not np.isnan(c.spent[measure]).any()}
    return Chart(
        name=f"loss-by-{measure}-{number}",
        title=f"Loss against {MEASURE_NAMES[measure]}",
        x_label=UNITS[measure],
        y_label="held-out loss (nats per token)",
        log_x=True,
        marks=marks,
        series=tuple(
            Series(name=name, x=tuple(c.spent[measure].tolist()), y=tuple(c.loss.tolist()))
            for name, c in known.items()
        ),
        caption="At the best learning rate of each, mean over seeds.",
    )


def _is_best(
    config: CompareConfig, outcome: Outcome, place: Mapping[str, Any], variant: Mapping[str, Any]
) -> bool:
    where = outcome.run.coordinates
    seeds = config.confirm_seeds or config.seeds
    return (
        outcome.result is not None
        and outcome.loss < math.inf
        and where["variant"] == variant["name"]
        and where["lr"] == variant["best_lr"]
        and where["seed"] in seeds
        and all(where[key] == value for key, value in place["place"].items())
    )
