"""The report of a scaling study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from muonscale.lab.console import si_text
from muonscale.lab.fits.bootstrap import CONFIDENCE
from muonscale.lab.fits.findings import Findings, format_ends, format_significant
from muonscale.lab.fits.page import fit_sections
from muonscale.lab.report.page import (
    Block,
    Chart,
    Mark,
    Page,
    PageSection,
    Series,
    Table,
    Text,
    Tile,
    Verdict,
)
from muonscale.lab.studies.report_blocks import (
    Found,
    begin_with_result,
    format_interval,
    interval_series,
    keep_nonempty,
)
from muonscale.lab.studies.scaling.analysis import (
    ADAMW_LAW,
    MUON_LAW,
    PAPER_RATIO,
    PAPER_RUNS,
    fit_laws,
    paper_ratio,
    seed_effects,
)
from muonscale.lab.studies.scaling.config import ScalingConfig
from muonscale.lab.studies.scaling.ladder import MeasuredRung
from muonscale.lab.studies.search.report import (
    EDGE_ADVICE,
    about_search,
    format_setting,
    search_blocks_by_variant,
)

COUNTED = {
    "counted": "every product of the run, Newton-Schulz included",
    "6ND": "6 N D, N without embeddings",
    "6ND-embeddings": "6 N D, N with embeddings",
}
NUMBERED = {
    "without-embeddings": "N without embeddings",
    "with-embeddings": "N with embeddings",
}


def report_ladder(
    config: ScalingConfig, names: list[str], measured: list[MeasuredRung], found: Found
) -> Page:
    """Return the report of the findings of `ScalingStudy.analyze`; charts refit the laws."""
    laws = fit_laws(config, measured, seed_effects(measured))
    verdicts = tuple(_verdicts(found))
    page = Page(
        title=f"Scaling over {len(names)} sizes",
        summary=f"Validation loss of {' and '.join(config.variants)} over a ladder of models: "
        f"{', '.join(names)} (width x layers).",
        sections=(
            PageSection(title="Verdicts", blocks=verdicts),
            *_report_ratios(found),
            _report_rungs(found),
            *_report_searches(config, found),
            *_report_laws("By FLOPs", "compute", laws.compute, COUNTED),
            *_report_laws("By parameters and tokens", "chinchilla", laws.chinchilla, NUMBERED),
        ),
    )
    claims = [block for block in verdicts if isinstance(block, Verdict)]
    return begin_with_result(page, claims, _tiles(found), "flops-ratio")


def _tiles(found: Found) -> Iterator[Tile]:
    """Yield the ratio at the most FLOPs that were measured, the lowest loss, and the sizes."""
    baseline = found["baseline"]
    for ratio in found["ratios"]:
        rows = [row for row in ratio["rows"] if not row["extrapolated"]]
        if rows and not ratio["not_tuned"]:
            ends = format_interval(rows[-1], ".2f", "no interval")
            note = f"{ends}, at {si_text(rows[-1]['flops'])} of {baseline}"
            label = f"FLOPs, {ratio['variant']} / {baseline}"
            yield Tile(label=label, value=f"{rows[-1]['ratio']:.2f}", note=note)
    means = [
        (sum(losses) / len(losses), row)
        for row in found["rungs"]
        if (losses := [loss for loss in row["losses"].values() if loss is not None])
    ]
    if means:
        loss, row = min(means, key=lambda item: item[0])
        note = f"{row['variant']}, {row['rung']}"
        yield Tile(label="lowest validation loss", value=f"{loss:.3f}", note=note)
        sizes = sorted({row["parameters"] for _, row in means})
        note = f"{si_text(sizes[0])} to {si_text(sizes[-1])} parameters"
        yield Tile(label="sizes", value=str(len(sizes)), note=note)


def _verdicts(found: Found) -> Iterator[Block]:
    if found["stopped"]:
        yield Verdict(False, f"The study stopped: {found['stopped']}")
    for ratio in found["ratios"]:
        yield from _claims(ratio, found["baseline"])
    edges = [
        f"{row['variant']} {row['rung']} ({', '.join(row['edges'])})"
        for row in found["rungs"]
        if row["edges"] and row["main"]
    ]
    if edges:
        yield Text(
            f"On these rungs the best setting is at an edge of those tried: {'; '.join(edges)}. {EDGE_ADVICE}"
        )


def _claims(ratio: Found, baseline: str) -> Iterator[Verdict]:
    """Yield the claims about an optimizer's FLOPs, each with its verdict."""
    name = ratio["variant"]
    if ratio["not_tuned"]:
        where = "; ".join(ratio["not_tuned"])
        yield Verdict(None, f"{name} against {baseline}: not tuned on {where}")
        return
    rows = [r for r in ratio["rows"] if not r["extrapolated"] and r["low"] is not None]
    if not rows:
        unmeasured = "no place where both were measured has an interval"
        why = ratio["why"] or (unmeasured if ratio["rows"] else "no runs")
        yield Verdict(None, f"{name} against {baseline}: {why}")
        return
    ends = f"{rows[0]['ratio']:.3f} at {si_text(rows[0]['flops'])} FLOPs of {baseline}"
    if len(rows) > 1:
        ends += f", {rows[-1]['ratio']:.3f} at {si_text(rows[-1]['flops'])}"
    below, above = all(r["high"] < 1 for r in rows), all(r["low"] > 1 for r in rows)
    claim = f"{name} takes fewer FLOPs than {baseline} to equal loss wherever both were measured"
    yield Verdict(True if below else False if above else None, f"{claim}: {ends}")
    holds = [r["low"] <= PAPER_RATIO <= r["high"] for r in rows]
    yield Verdict(
        True if all(holds) else None if any(holds) else False,
        f"Moonlight's {PAPER_RATIO} is inside the interval of the ratio at {sum(holds)} of "
        f"{len(rows)} places",
    )
    if (trend := ratio["trend"]) is not None:
        expected = ADAMW_LAW[1] / MUON_LAW[1] - 1
        yield Verdict(
            True if trend["low"] > 0 else False if trend["high"] < 0 else None,
            f"the advantage of {name} narrows with C: slope of log ratio {trend['value']:+.3f} (90 "
            f"% {format_interval(trend, '+.3f')}); Moonlight's laws have {expected:+.3f}",
        )


def _report_ratios(found: Found) -> list[PageSection]:
    ratios = [ratio for ratio in found["ratios"] if ratio["rows"]]
    if not ratios:
        return []
    baseline, rows, series = found["baseline"], [], []
    for ratio in ratios:
        name = ratio["variant"]
        title = f"{name} / {baseline}"
        series.append(interval_series(title, ratio["rows"], "flops", "ratio", group=name))
        for r in ratio["rows"]:
            remark = "extrapolated" if r["extrapolated"] else ""
            ends = format_interval(r, ".3f", "")
            rows.append((name, si_text(r["flops"]), f"{r['ratio']:.3f}", ends, remark))
    # The FLOPs at which Moonlight's laws have the ratio that its text gives.
    beyond = np.geomspace(PAPER_RUNS[0], 100 * PAPER_RUNS[1], 2001).tolist()
    point = min(beyond, key=lambda c: abs(paper_ratio(c) - PAPER_RATIO))
    places = np.geomspace(*PAPER_RUNS, 9).tolist()
    laws = Series(
        name="Moonlight's laws",
        x=tuple(places),
        y=tuple(map(paper_ratio, places)),
        kind="dashed",
    )
    quoted = f"Moonlight's {PAPER_RATIO}"
    headline = Series(name=quoted, x=(point,), y=(PAPER_RATIO,), kind="points")
    equal = Mark(axis="y", at=1.0, label="equal")

    def chart(name: str, title: str, lines: list[Series], marks: list[Mark], caption: str) -> Chart:
        return Chart(
            name=name,
            title=title,
            x_label=f"FLOPs of {baseline}",
            y_label=f"FLOPs at equal loss, over those of {baseline}",
            series=tuple(lines),
            marks=tuple(marks),
            log_x=True,
            log_y=True,
            caption=caption,
        )

    charts = keep_nonempty(
        chart(
            "flops-ratio",
            "FLOPs at equal loss",
            series,
            [equal, Mark(axis="y", at=PAPER_RATIO, label=f"Moonlight {PAPER_RATIO}")],
            f"By the laws of both, with {CONFIDENCE:.0%} intervals, over the losses that both measured.",
        ),
        chart(
            "flops-ratio-paper",
            "Beside Moonlight's laws",
            [*series, laws, headline],
            [equal],
            "Moonlight's laws (arXiv 2502.16982, table 3) over the FLOPs of its own runs. Its "
            f"{PAPER_RATIO} is the ratio of these laws at {point:.2g} FLOPs, beyond its runs. "
            "Nothing was measured between the two.",
        ),
    )
    table = Table(
        name="flops-ratios",
        head=("optimizer", f"FLOPs of {baseline}", "ratio", f"{CONFIDENCE:.0%} interval", "remark"),
        rows=tuple(rows),
    )
    return [PageSection(title="FLOPs at equal loss", blocks=(*charts, table))]


def _report_rungs(found: Found) -> PageSection:
    head = (
        *("optimizer", "rung", "N", "N without embeddings", "tokens", "steps", "FLOPs"),
        *("of them Newton-Schulz", "setting", "edge", "loss", "seeds"),
    )
    rows = []
    for row in found["rungs"]:
        losses = [loss for loss in row["losses"].values() if loss is not None]
        rows.append(
            (
                row["variant"],
                row["rung"],
                f"{row['parameters']:,}",
                f"{row['without_embeddings']:,}",
                f"{row['tokens']:,}",
                f"{row['steps']:,}",
                si_text(row["flops"]),
                f"{row['newton_schulz']:.1%}",
                format_setting(row["values"]),
                ", ".join(row["edges"]),
                f"{sum(losses) / len(losses):.4f}" if losses else "-",
                ", ".join("diverged" if x is None else f"{x:.4f}" for x in row["losses"].values()),
            )
        )
    effects = ", ".join(f"{e:+.2%} for seed {seed}" for seed, e in found["seed_effects"].items())
    text = Text(
        "Runs of one seed share the validation split and the order of the data. Before a law is "
        f"fitted, the effect of each seed ({effects or 'not known yet'}) is removed from the "
        "losses. The table has the losses as measured."
    )
    table = Table(head=head, rows=tuple(rows), name="ladder")
    return PageSection(title="The ladder", blocks=(table, text))


def _report_searches(config: ScalingConfig, found: Found) -> list[PageSection]:
    """Return what was searched on every rung."""
    if config.search is None:
        return []
    rows = [
        {**row, "name": f"{row['variant']} {row['rung']}"} for row in found["rungs"] if row["main"]
    ]
    blocks = (
        *about_search(config.search, config.variants),
        *search_blocks_by_variant(config.search, rows),
    )
    return [PageSection(title="How settings were found", blocks=blocks)]


def _report_laws(
    part: str, prefix: str, laws: Mapping[str, Findings | str], names: Mapping[str, str]
) -> list[PageSection]:
    """Return the full results for the first way of counting, and the numbers by every way."""
    fitted = {name: law for name, law in laws.items() if isinstance(law, Findings)}
    if not fitted:
        why = next(iter(laws.values()))
        return [PageSection(title="No law", blocks=(Text(f"{why}."),), part=part)]
    first = next(iter(fitted))
    rows = tuple(
        (
            names[name],
            fit.name,
            value.name,
            format_significant(value.value),
            format_ends(value.low, value.high),
        )
        for name, law in fitted.items()
        for fit in law.fits
        for value in fit.estimates
        if " at C = " not in value.name
    )
    ratios = tuple(
        (
            names[name],
            f"{ratio.first} / {ratio.second}",
            row.name,
            format_significant(row.value),
            format_ends(row.low, row.high),
        )
        for name, law in fitted.items()
        for ratio in law.ratios
        for row in ratio.rows
        if not row.extrapolated
    )
    blocks: list[Block] = [
        Table(
            head=("counted", "optimizer", "what", "value", f"{CONFIDENCE:.0%} interval"),
            rows=rows,
            name=f"{prefix}-conventions",
        )
    ]
    if ratios:
        head = ("counted", "of", "FLOPs", "ratio at equal loss", f"{CONFIDENCE:.0%} interval")
        blocks.append(Table(head=head, rows=ratios, name=f"{prefix}-ratios"))
    conventions = PageSection(title="By every way of counting", blocks=tuple(blocks), part=part)
    whole = fit_sections(fitted[first], f"{prefix}-", part)
    counted = Text(f"Counted here: {names[first]}.")
    whole[0] = PageSection(title=whole[0].title, blocks=(counted, *whole[0].blocks), part=part)
    return [*whole, conventions]
