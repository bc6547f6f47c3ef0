"""The report of a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from muonscale.lab.fits.bootstrap import LEVEL
from muonscale.lab.report.page import (
    Block,
    Chart,
    Mark,
    Page,
    PageSection,
    Series,
    Table,
    Text,
    Verdict,
)
from muonscale.lab.studies.analysis.curves import MEASURES, average_curves, read_curve
from muonscale.lab.studies.analysis.seed_blocks import CLAIM
from muonscale.lab.studies.compare.config import CompareConfig
from muonscale.lab.studies.report_blocks import (
    LOSS,
    Found,
    format_interval,
    format_or_dash,
    keep_nonempty,
    seed_series,
)
from muonscale.lab.studies.study import Outcome, Outcomes
from muonscale.lab.studies.variants import VARIANTS

UNITS = {
    "steps": "optimizer steps",
    "tokens": "training tokens",
    "flops": "FLOPs, Newton-Schulz included",
    "seconds": "seconds of training steps",
}


def report_comparison(config: CompareConfig, found: Found, outcomes: Outcomes) -> Page:
    """Return the report of the findings of `CompareStudy.analyze`."""
    sections = [_about(config)]
    for number, place in enumerate(found["places"]):
        name = ", ".join(f"{key} {value}" for key, value in place["place"].items())
        blocks = (
            *_verdicts(place, config.baselines),
            _loss_table(place, number),
            _comparison_table(place, number),
            *keep_nonempty(_lr_chart(place, number)),
            *_reach_tables(config, place, number),
            *_curve_charts(config, place, outcomes, number),
        )
        sections.append(PageSection(title=name or "Result", blocks=blocks))
    names = list(config.variants)
    return Page(
        title=" against ".join(names) if len(names) <= 3 else f"{len(names)} optimizers compared",
        summary=f"{', '.join(names)}: {len(config.lr)} learning rates and {len(config.seeds)} "
        "seeds each, equal tokens.",
        sections=tuple(sections),
    )


def _about(config: CompareConfig) -> PageSection:
    rows = []
    for name, keys in config.variants.items():
        known = VARIANTS.get(name)
        own = ", ".join(f"{key}={value}" for key, value in keys.items())
        what = ", ".join(part for part in (known.what if known else "", own) if part)
        rates = ", ".join(f"{lr:g}" for lr in config.rates(name))
        rows.append((name, what, known.source if known else "", rates))
    if config.confirm_seeds:
        seeds = ", ".join(map(str, config.confirm_seeds))
        compared = (
            f"The best learning rate was run again with seeds {seeds}, which chose nothing, and "
            "only these runs are compared."
        )
    else:
        compared = (
            "The losses that are compared also picked the best learning rate, for every variant in "
            "the same way."
        )
    return PageSection(
        title="What was compared",
        blocks=(
            Table(head=("variant", "what it is", "source", "learning rates"), rows=tuple(rows)),
            Text(
                "Every variant has the same number of learning rates, the same seeds "
                f"({', '.join(map(str, config.seeds))}) and the same tokens. {compared}"
            ),
            Text(
                f"Intervals are {LEVEL:.0%}. Runs of one seed share initial weights, order of the "
                "data and validation split, so differences are taken seed by seed, with one noise "
                "estimated from all compared learning rates. A variant is called better if the "
                "one-sided p-value, adjusted for the number of comparisons (Holm), is below "
                f"{CLAIM:g}, and likely better if only the interval is below zero."
            ),
        ),
    )


def _verdicts(place: Found, baselines: list[str]) -> Iterator[Block]:
    yield from (Text(note) for note in place["notes"])
    for v in place["variants"]:
        if v["edge"]:
            end = {"low": "lowest", "high": "highest"}[v["edge"]]
            yield Text(
                f"The best learning rate of {v['name']}, {v['best_lr']:g}, is the {end} that was "
                "tried. A better one may be beyond it, which may change the result of this variant."
            )
    for c in place["comparisons"]:
        if {c["better"], c["worse"]} & set(baselines):
            interval = "no interval"
            if c["low"] is not None:
                interval = f"{LEVEL:.0%} {format_interval(c, '+.4f')}"
            numbers = (
                f"{c['difference']:+.4f} nats ({interval}), one-sided p {_p(c['p'])}, adjusted "
                f"{_p(c['p_adjusted'])}"
            )
            different = c["verdict"] in ("better", "likely better")
            claim = (
                f"{c['better']} is {c['verdict']} than {c['worse']}"
                if different
                else f"{c['better']} and {c['worse']} are not significantly different"
            )
            yield Verdict(different or None, f"{claim}: {numbers}")


def _p(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"


def _loss_table(place: Found, number: int) -> Table:
    rows = []
    for v in sorted(place["variants"], key=lambda v: math.inf if v["loss"] is None else v["loss"]):
        ppl, low, high = v["perplexity"]
        rows.append(
            (
                v["name"],
                format_or_dash(v["best_lr"], "g"),
                v["edge"] or "",
                format_or_dash(v["loss"]),
                format_interval(v),
                format_or_dash(ppl, ".2f"),
                format_interval({"low": low, "high": high}, ".2f"),
            )
        )
    return Table(
        name=f"losses-{number}",
        head=(
            *("variant", "best lr", "edge", "validation loss", "interval"),
            *("perplexity", "interval"),
        ),
        rows=tuple(rows),
        caption="Validation loss in nats per token after the last step. These intervals include "
        "the luck of the seed; those of differences do not (noise "
        f"{format_or_dash(place['sigma'])} nats, {place['freedom']} degrees of freedom).",
    )


def _comparison_table(place: Found, number: int) -> Table:
    rows = tuple(
        (
            c["better"],
            c["worse"],
            f"{c['difference']:+.4f}",
            format_interval(c, "+.4f", "no interval"),
            _p(c["p"]),
            _p(c["p_adjusted"]),
            c["verdict"],
        )
        for c in place["comparisons"]
    )
    head = ("lower", "than", "difference", "interval", "p", "p adjusted", "verdict")
    return Table(name=f"comparisons-{number}", head=head, rows=rows)


def _lr_chart(place: Found, number: int) -> Chart:
    return Chart(
        name=f"learning-rates-{number}",
        title="Loss by learning rate",
        x_label="learning rate",
        y_label=LOSS,
        log_x=True,
        series=tuple(seed_series(v["name"], v["points"], "lr") for v in place["variants"]),
        caption="Mean over seeds; bars reach from the lowest to the highest. Learning rates at "
        "which a run diverged have no point.",
    )


def _reach_tables(config: CompareConfig, place: Found, number: int) -> Iterator[Table]:
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
            caption=f"The amount spent until the mean curve has the final loss of {name}, and in "
            f"brackets its ratio to the whole of {name}'s. All runs have the schedule of a whole "
            "run: a run planned shorter would be lower earlier. With > the loss was not reached by "
            "the end, with < it was reached at the first evaluation.",
        )


def _spent(r: Found | None, whole: float | None) -> str:
    if r is None or r["amount"] is None or whole is None:
        return "-"
    part = "" if r["censored"] else f" ({r['amount'] / whole:.2f})"
    amount = r["amount"]
    text = f"{amount:,.0f}" if 1e4 <= amount < 1e9 else f"{amount:.4g}"
    return f"{r['censored']} {text}{part}".strip()


def _curve_charts(
    config: CompareConfig, place: Found, outcomes: Outcomes, number: int
) -> list[Block]:
    """Return the loss against tokens, FLOPs and seconds, of the runs that are compared."""
    seeds = config.confirm_seeds or config.seeds

    def is_compared(outcome: Outcome, variant: Found) -> bool:
        where = outcome.run.coordinates
        wanted = {**place["place"], "variant": variant["name"], "lr": variant["best_lr"]}
        finished = math.isfinite(outcome.loss)
        return finished and where["seed"] in seeds and wanted.items() <= where.items()

    curves = {}
    for v in place["variants"]:
        if runs := [o for o in outcomes.values() if is_compared(o, v)]:
            curves[v["name"]] = average_curves([read_curve(run) for run in runs])
    marks = tuple(
        Mark(axis="y", at=v["loss"], label=f"{v['name']} at the end")
        for v in place["variants"]
        if v["name"] in config.baselines and v["loss"] is not None
    )
    names = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}
    charts = [
        Chart(
            name=f"loss-by-{measure}-{number}",
            title=f"Loss against {name}",
            x_label=UNITS[measure],
            y_label=LOSS,
            log_x=True,
            marks=marks,
            series=tuple(
                Series(name=variant, x=tuple(c.spent[measure].tolist()), y=tuple(c.loss.tolist()))
                for variant, c in curves.items()
                if not np.isnan(c.spent[measure]).any()
            ),
            caption="At the best learning rate of each, mean over seeds.",
        )
        for measure, name in names.items()
    ]
    return keep_nonempty(*charts)
