"""The report of a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from muonscale.lab.console import si_text
from muonscale.lab.fits.bootstrap import CONFIDENCE
from muonscale.lab.report.page import (
    Block,
    Chart,
    ChartViews,
    Mark,
    Page,
    PageSection,
    Series,
    Table,
    Text,
    Tile,
    Verdict,
)
from muonscale.lab.studies.analysis.curves import MEASURES, average_curves, read_curve
from muonscale.lab.studies.analysis.seed_blocks import CLAIM
from muonscale.lab.studies.compare.config import LENGTH, CompareConfig
from muonscale.lab.studies.report_blocks import (
    LOSS,
    Found,
    begin_with_result,
    format_interval,
    format_or_dash,
    interval_series,
    keep_nonempty,
)
from muonscale.lab.studies.search.report import (
    EDGE_ADVICE,
    about_search,
    format_setting,
    search_blocks,
)
from muonscale.lab.studies.study import Outcome
from muonscale.lab.studies.variants import VARIANTS

UNITS = {
    "steps": "optimizer steps",
    "tokens": "training tokens",
    "flops": "FLOPs, Newton-Schulz included",
    "seconds": "seconds of training steps",
}

LENGTHS_CHART = "flops-to-equal-loss"

CENSORED = {
    "<": "below its shortest run",
    ">": "beyond its longest run",
    "<>": "below its shortest or beyond its longest run",
}


def report_comparison(
    config: CompareConfig, found: Found, compared: Sequence[Mapping[str, list[Outcome]]]
) -> Page:
    """Return the report of the findings of `CompareStudy.analyze`.

    Args:
        config: of the study.
        found: its findings.
        compared: the compared runs that finished, by variant, at every place of the findings.
    """
    sections, headline = [], []
    if found["stopped"]:
        stop = Verdict(False, f"The study stopped: {found['stopped']}")
        sections.append(PageSection(title="Stopped", blocks=(stop,)))
    if found["lengths"]:
        sections.append(_lengths(found["lengths"]))
    for number, (place, runs) in enumerate(zip(found["places"], compared, strict=True)):
        name = _place_text(place["place"])
        verdicts = list(_verdicts(place, config.baselines))
        headline = [block for block in verdicts if isinstance(block, Verdict)] or headline
        blocks = (
            *verdicts,
            _loss_table(place, number),
            _comparison_table(place, number),
            *_reach_tables(config, place, number),
            *_curve_charts(config, place, runs, number),
            *(
                search_blocks(place["variants"], config.search.keys, f"-{number}")
                if number == 0 or config.search.at == "every"
                else ()
            ),
        )
        sections.append(PageSection(title=name or "The comparison", blocks=blocks))
    names = list(config.variants)
    searched = " and ".join(item.key for item in config.search.keys.values())
    page = Page(
        title=" against ".join(names) if len(names) <= 3 else f"{len(names)} optimizers compared",
        summary=f"{', '.join(names)}: {searched} searched for each with equal numbers of settings, "
        f"then {len(config.seeds)} seeds each, equal tokens.",
        sections=(*sections, _about(config)),
    )
    last = f"loss-by-tokens-{len(found['places']) - 1}"
    chart = LENGTHS_CHART if any(c.name == LENGTHS_CHART for c in page.charts) else last
    return begin_with_result(page, headline, _tiles(found, config.baselines[0]), chart)


def _tiles(found: Found, baseline: str) -> Iterator[Tile]:
    """Yield the lowest loss of the last place with a result, and what it saves."""
    places = [p for p in found["places"] if any(v["loss"] is not None for v in p["variants"])]
    if not places:
        return
    known = [v for v in places[-1]["variants"] if v["loss"] is not None]
    best = min(known, key=lambda v: v["loss"])
    where = _place_text(places[-1]["place"])
    note = ", ".join(filter(None, (best["name"], where)))
    yield Tile(label="lowest validation loss", value=f"{best['loss']:.3f}", note=note)
    for c in places[-1]["comparisons"]:
        if (c["better"], c["worse"]) == (best["name"], baseline):
            ends = "" if c["low"] is None else f", {CONFIDENCE:.0%} {format_interval(c, '+.3f')}"
            note = f"nats, {c['better']} against {c['worse']}{ends}"
            yield Tile(label="difference", value=f"{c['difference']:+.3f}", note=note)
    rows = [
        row
        for row in found["lengths"]
        if row["measure"] == "flops"
        and not row["censored"]
        and (row["variant"], row["baseline"]) == (best["name"], baseline)
    ]
    reached = best["reach"].get(baseline, {}).get("flops")
    row = rows[-1] if rows else reached
    if row is not None and row["ratio"] is not None and best["name"] != baseline:
        at = _place_text(rows[-1]["place"]) if rows else where
        ends = "" if row["low"] is None else f", {CONFIDENCE:.0%} {format_interval(row, '.0%')}"
        note = ", ".join(filter(None, (f"of {baseline}'s{ends}", at)))
        yield Tile(label="FLOPs to equal loss", value=f"{row['ratio']:.0%}", note=note)


def _place_text(place: Mapping[str, object]) -> str:
    """Return the values of the axes as people read them."""
    return ", ".join(
        f"{value:g} {key.replace('_', ' ')}" if key == LENGTH else f"{key} {value}"
        for key, value in place.items()
    )


def _about(config: CompareConfig) -> PageSection:
    rows = []
    for name, keys in config.variants.items():
        known = VARIANTS.get(name)
        own = ", ".join(f"{key}={value}" for key, value in keys.items())
        what = ", ".join(part for part in (known.what if known else "", own) if part)
        rows.append((name, what, known.source if known else ""))
    both = sorted(set(config.seeds) & set(config.search.seeds))
    chose = "which chose nothing"
    if both:
        chose = f"of which {', '.join(map(str, both))} also picked it"
    return PageSection(
        title="What was compared",
        blocks=(
            Table(head=("variant", "what it is", "source"), rows=tuple(rows)),
            *about_search(config.search, config.variants),
            Text(
                "The best setting of every variant was run with seeds "
                f"{', '.join(map(str, config.seeds))}, {chose}, and only these runs are compared. "
                "All runs at a place have the same tokens."
            ),
            Text(
                f"Intervals are {CONFIDENCE:.0%}. Runs of one seed share initial weights, order of the "
                "data and validation split, so differences are taken seed by seed, with one noise "
                "estimated from all compared runs. A variant is called better if the one-sided "
                "p-value, adjusted for the number of comparisons (Holm), is below "
                f"{CLAIM:g}, and likely better if only the interval is below zero. There is no "
                "verdict where one of the two is not tuned."
            ),
        ),
    )


def _lengths(rows: Sequence[Found]) -> PageSection:
    """Return tokens and FLOPs to equal loss by runs that end there."""
    cells, series = [], []
    for row in rows:
        place = _place_text(row["place"])
        value = CENSORED.get(row["censored"])
        cells.append(
            (
                f"{row['variant']} / {row['baseline']}",
                row["measure"],
                place,
                value or f"{row['ratio']:.3f}",
                "-" if value else format_interval(row, ".3f"),
                "" if row["tuned"] else "not tuned",
            )
        )
    for row in rows:
        if row["measure"] == "flops" and not row["censored"]:
            series.append(row)
    names = dict.fromkeys(f"{row['variant']} / {row['baseline']}" for row in series)
    chart = Chart(
        name=LENGTHS_CHART,
        title="FLOPs to equal loss, by whole runs",
        x_label=f"{LENGTH.replace('_', ' ')} of the baseline",
        y_label="FLOPs over the baseline's",
        log_x=True,
        series=tuple(
            interval_series(
                name,
                [
                    {**row, "length": row["place"][LENGTH]}
                    for row in series
                    if f"{row['variant']} / {row['baseline']}" == name
                ],
                "length",
                "ratio",
            )
            for name in names
        ),
        marks=(Mark(axis="y", at=1.0, label="equal"),),
        caption=f"Below 1 the variant needs fewer. Bars are {CONFIDENCE:.0%} intervals over seeds.",
    )
    head = (
        "of",
        "measure",
        "at the baseline's loss",
        "ratio",
        f"{CONFIDENCE:.0%} interval",
        "remark",
    )
    return PageSection(
        title="Cost to equal loss, by whole runs",
        blocks=(
            *keep_nonempty(chart),
            Table(name="lengths", head=head, rows=tuple(cells)),
            Text(
                "The final losses of a variant's runs of all lengths, each with the schedule of "
                "its own length, are interpolated over their tokens or FLOPs. The table says what "
                "it spends to have the baseline's final loss, over what the baseline spends: seed "
                "by seed, then the geometric mean. Nothing is extrapolated."
            ),
        ),
    )


def _verdicts(place: Found, baselines: list[str]) -> Iterator[Block]:
    yield from (Text(note) for note in place["notes"])
    for v in place["variants"]:
        if v["edges"] and v["loss"] is not None:
            yield Text(
                f"{v['name']} is not tuned: its best setting, {format_setting(v['best'])}, is at an "
                f"edge of those tried ({', '.join(v['edges'])}). {EDGE_ADVICE}"
            )
    for c in place["comparisons"]:
        if {c["better"], c["worse"]} & set(baselines):
            interval = "no interval"
            if c["low"] is not None:
                interval = f"{CONFIDENCE:.0%} {format_interval(c, '+.4f')}"
            numbers = (
                f"{c['difference']:+.4f} nats ({interval}), one-sided p {_p(c['p'])}, adjusted "
                f"{_p(c['p_adjusted'])}"
            )
            different = c["verdict"] in ("better", "likely better")
            if different:
                claim = f"{c['better']} is {c['verdict']} than {c['worse']}"
            elif c["verdict"] == "not tuned":
                claim = f"{c['better']} and {c['worse']} cannot be judged, one is not tuned"
            else:
                claim = f"{c['better']} and {c['worse']} are not significantly different"
            where = _place_text(place["place"])
            claim = f"{claim} at {where}" if where else claim
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
                format_setting(v["best"]),
                ", ".join(v["edges"]),
                format_or_dash(v["loss"]),
                format_interval(v),
                format_or_dash(ppl, ".2f"),
                format_interval({"low": low, "high": high}, ".2f"),
            )
        )
    return Table(
        name=f"losses-{number}",
        head=(
            *("variant", "best setting", "edge", "validation loss", "interval"),
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


def _reach_tables(config: CompareConfig, place: Found, number: int) -> Iterator[Table]:
    for name in config.baselines:
        whole = next(v for v in place["variants"] if v["name"] == name)["reach"].get(name)
        if whole is None:
            continue
        rows = []
        for v in place["variants"]:
            reached = v["reach"].get(name, {})
            cells = [_spent(reached.get(measure)) for measure in MEASURES]
            rows.append((v["name"], *cells))
        yield Table(
            name=f"to-{name}-{number}",
            head=(f"to {name}'s loss", *(UNITS[measure] for measure in MEASURES)),
            rows=tuple(rows),
            caption=f"The amount spent until the mean curve has the final loss of {name}; in "
            f"brackets its ratio to the whole of {name}'s, the geometric mean over seeds with its "
            f"{CONFIDENCE:.0%} interval. All runs have the schedule of a whole run: a run planned shorter would "
            "be lower earlier. With > the loss was not reached by the end, with < it was reached at "
            "the first evaluation.",
        )


def _spent(r: Found | None) -> str:
    if r is None or r["amount"] is None:
        return "-"
    amount = r["amount"]
    text = f"{amount:,.0f}" if 1e4 <= amount < 1e9 else f"{amount:.4g}"
    text = si_text(amount) if amount >= 1e9 else text
    ratio = ""
    if r["ratio"] is not None:
        ends = "" if r["low"] is None else f", {format_interval(r, '.2f')}"
        ratio = f" ({r['ratio']:.2f}{ends})"
    return f"{r['censored']} {text}{ratio}".strip()


def _curve_charts(
    config: CompareConfig, place: Found, runs: Mapping[str, list[Outcome]], number: int
) -> list[Block]:
    """Return the loss against tokens, FLOPs and seconds, of the runs that are compared."""
    curves = {}
    for name, finished in runs.items():
        if finished:
            curves[name] = average_curves([read_curve(run) for run in finished])
    marks = tuple(
        Mark(axis="y", at=v["loss"], label=f"{v['name']} at the end")
        for v in place["variants"]
        if v["name"] in config.baselines and v["loss"] is not None
    )
    names = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}
    charts = [
        Chart(
            name=f"loss-by-{measure}-{number}",
            title=f"Validation loss against {name}",
            x_label=UNITS[measure],
            y_label=LOSS,
            log_x=True,
            marks=marks,
            series=tuple(
                Series(name=variant, x=tuple(c.spent[measure].tolist()), y=tuple(c.loss.tolist()))
                for variant, c in curves.items()
                if not np.isnan(c.spent[measure]).any()
            ),
            caption="At the best setting of each, mean over seeds.",
        )
        for measure, name in names.items()
    ]
    whole = [c for c in charts if len(c.series) == len(curves)]
    if not curves or len(whole) < 2:
        return keep_nonempty(*charts)
    views = tuple((names[c.name.split("-")[2]], c) for c in whole)
    return [ChartViews(views=views), *keep_nonempty(*(c for c in charts if c not in whole))]
