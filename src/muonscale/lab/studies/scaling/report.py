"""The report of a scaling study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from muonscale.lab.fits.findings import Findings, format_significant
from muonscale.lab.fits.page import fit_sections
from muonscale.lab.fits.text import format_ends
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
from muonscale.lab.studies.report_blocks import (
    command_block,
    drawn,
    failures_section,
    versions_section,
)
from muonscale.lab.studies.scaling.analysis import (
    ADAMW_LAW,
    MUON_LAW,
    PAPER_RATIO,
    PAPER_RUNS,
    laws_of,
    paper_ratio,
    rungs_of,
    seed_effects,
)
from muonscale.lab.studies.study import Outcomes

if TYPE_CHECKING:
    from muonscale.lab.studies.scaling.study import Scaling

COUNTED = {
    "counted": "every product of the run, Newton-Schulz included",
    "6ND": "6 N D, N without embeddings",
    "6ND-embeddings": "6 N D, N with embeddings",
}
NUMBERED = {
    "without-embeddings": "N without embeddings",
    "with-embeddings": "N with embeddings",
}


def scaling_page(study: Scaling, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
    """Return the report of what `Scaling.analyse` found."""
    measured = rungs_of(study, outcomes)
    laws = laws_of(study, measured, seed_effects(measured))
    return Page(
        title=f"Scaling over {len(study.names)} sizes",
        summary=f"Held-out loss of {' and '.join(study.config.variants)} over a ladder of models: "
        f"{', '.join(study.names)} (width x layers).",
        sections=(
            _verdicts(study, found),
            *_ratio_section(found),
            _ladder(found),
            *_searches(study, found),
            *_law_sections("By operations", "compute", laws.compute, COUNTED),
            *_law_sections("By parameters and tokens", "chinchilla", laws.chinchilla, NUMBERED),
            *failures_section(found),
            versions_section(outcomes),
        ),
    )


def _verdicts(study: Scaling, found: Mapping[str, Any]) -> Section:
    blocks: list[Block] = [command_block(study.config)]
    if found["stopped"]:
        blocks.append(Verdict(False, f"The study stopped: {found['stopped']}"))
    for ratio in found["ratios"]:
        blocks += _claims(ratio, found["baseline"])
    edges = [
        f"{row['variant']} {row['rung']} ({', '.join(row['edges'])})"
        for row in found["rungs"]
        if row["edges"] and row["main"]
    ]
    if edges:
        blocks.append(
            Text(
                f"The best setting lies at the edge of what was tried on these rungs: {'; '.join(edges)}. "
                "A lower loss may lie beyond it."
            )
        )
    return Section(title="Verdicts", blocks=tuple(blocks))


def _claims(ratio: Mapping[str, Any], baseline: str) -> list[Verdict | Text]:
    """Return what is claimed of an optimizer's operations, each with its verdict."""
    name = ratio["variant"]
    rows = [r for r in ratio["rows"] if not r["extrapolated"] and r["low"] is not None]
    if not rows:
        return [Verdict(None, f"{name} against {baseline}: {ratio['why'] or _unmeasured(ratio)}")]
    ends = f"{rows[0]['ratio']:.3f} at {rows[0]['flops']:.2g} FLOPs of {baseline}"
    if len(rows) > 1:
        ends += f", {rows[-1]['ratio']:.3f} at {rows[-1]['flops']:.2g}"
    below, above = (all(r["high"] < 1 for r in rows), all(r["low"] > 1 for r in rows))
    fewer = True if below else False if above else None
    holds = [r["low"] <= PAPER_RATIO <= r["high"] for r in rows]
    paper = True if all(holds) else None if any(holds) else False
    return [
        Verdict(
            fewer,
            f"{name} takes fewer operations than {baseline} to equal loss, wherever both were measured: "
            f"{ends}",
        ),
        Verdict(
            paper,
            f"Moonlight's {PAPER_RATIO} lies inside the interval of the ratio at {sum(holds)} of "
            f"{len(rows)} places",
        ),
        *_trend(ratio, name),
    ]


def _unmeasured(ratio: Mapping[str, Any]) -> str:
    return "no place where both were measured has an interval" if ratio["rows"] else "no runs"


def _trend(ratio: Mapping[str, Any], name: str) -> list[Verdict | Text]:
    trend = ratio["trend"]
    if trend is None:
        return []
    expected = ADAMW_LAW[1] / MUON_LAW[1] - 1
    narrows = True if trend["low"] > 0 else False if trend["high"] < 0 else None
    return [
        Verdict(
            narrows,
            f"the advantage of {name} narrows with C: slope of log ratio {trend['value']:+.3f} "
            f"(90 % {trend['low']:+.3f} to {trend['high']:+.3f}); Moonlight's laws have {expected:+.3f}",
        )
    ]


def _ratio_section(found: Mapping[str, Any]) -> list[Section]:
    ratios = [ratio for ratio in found["ratios"] if ratio["rows"]]
    if not ratios:
        return []
    baseline = found["baseline"]
    series = tuple(_ratio_series(ratio, baseline) for ratio in ratios)
    places = np.geomspace(*PAPER_RUNS, 9).tolist()
    paper = Series(
        name="Moonlight's laws",
        x=tuple(places),
        y=tuple(paper_ratio(c) for c in places),
        kind="dashed",
    )
    point = _paper_place()
    headline = Series(
        name=f"Moonlight's {PAPER_RATIO}", x=(point,), y=(PAPER_RATIO,), kind="points"
    )
    labels = {
        "x_label": f"operations of {baseline} (FLOPs)",
        "y_label": f"operations at equal loss, over those of {baseline}",
    }
    charts = (
        Chart(
            name="flops-ratio",
            title="Operations at equal loss",
            series=series,
            marks=(
                Mark(axis="y", at=1.0, label="equal"),
                Mark(axis="y", at=PAPER_RATIO, label=f"Moonlight {PAPER_RATIO}"),
            ),
            log_x=True,
            log_y=True,
            caption="By the laws of both, with 90 % intervals, over the losses that both measured.",
            **labels,
        ),
        Chart(
            name="flops-ratio-paper",
            title="Beside Moonlight's laws",
            series=(*series, paper, headline),
            marks=(Mark(axis="y", at=1.0, label="equal"),),
            log_x=True,
            log_y=True,
            caption=f"Moonlight's laws (arXiv 2502.16982, table 3) over the operations of its own runs; its "
            f"{PAPER_RATIO} is what they say of {point:.2g} FLOPs, beyond these runs. Nothing was measured "
            "between the two.",
            **labels,
        ),
    )
    table = Table(
        name="flops-ratios",
        head=("optimizer", f"FLOPs of {baseline}", "ratio", "90 % interval", "remark"),
        rows=tuple(_ratio_row(ratio["variant"], row) for ratio in ratios for row in ratio["rows"]),
    )
    return [Section(title="Operations at equal loss", blocks=(*drawn(*charts), table))]


def _ratio_series(ratio: Mapping[str, Any], baseline: str) -> Series:
    rows = ratio["rows"]
    name = ratio["variant"]
    return Series(
        name=f"{name} / {baseline}",
        x=tuple(r["flops"] for r in rows),
        y=tuple(r["ratio"] for r in rows),
        low=tuple(_or_nan(r["low"]) for r in rows),
        high=tuple(_or_nan(r["high"]) for r in rows),
        kind="both",
        group=name,
    )


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _ratio_row(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    ends = "" if row["low"] is None else f"{row['low']:.3f} to {_or_nan(row['high']):.3f}"
    remark = "extrapolated" if row["extrapolated"] else ""
    return name, format_significant(row["flops"]), f"{row['ratio']:.3f}", ends, remark


def _paper_place() -> float:
    """Return the FLOPs at which Moonlight's laws have the ratio that its text gives."""
    places = np.geomspace(PAPER_RUNS[0], 100 * PAPER_RUNS[1], 2001)
    gaps = [abs(paper_ratio(float(c)) - PAPER_RATIO) for c in places]
    return float(places[int(np.argmin(gaps))])


def _ladder(found: Mapping[str, Any]) -> Section:
    head = (
        *("optimizer", "rung", "N", "N without embeddings", "tokens", "steps", "FLOPs"),
        *("of them Newton-Schulz", "lr", "batch", "edge", "loss", "seeds"),
    )
    rows = tuple(_rung_row(row) for row in found["rungs"])
    effects = ", ".join(f"{e:+.2%} for seed {seed}" for seed, e in found["seed_effects"].items())
    said = Text(
        "Runs of one seed share the held-out split and the order of the data. What all of them have in common "
        f"({effects or 'nothing is known yet'}) is taken out of the losses before a law is fitted; the table "
        "has them as they were measured."
    )
    return Section(title="The ladder", blocks=(Table(head=head, rows=rows, name="ladder"), said))


def _rung_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    losses = [loss for loss in row["losses"].values() if loss is not None]
    mean = f"{sum(losses) / len(losses):.4f}" if losses else "-"
    return (
        row["variant"],
        row["rung"],
        f"{row['parameters']:,}",
        f"{row['without_embeddings']:,}",
        f"{row['tokens']:,}",
        f"{row['steps']:,}",
        f"{row['flops']:.3g}",
        f"{row['newton_schulz']:.1%}",
        f"{row['lr']:.3g}",
        "" if row["batch"] is None else f"{row['batch']:,}",
        ", ".join(row["edges"]),
        mean,
        ", ".join("diverged" if x is None else f"{x:.4f}" for x in row["losses"].values()),
    )


def _searches(study: Scaling, found: Mapping[str, Any]) -> list[Section]:
    """Return the curves over the learning rate of every rung that was searched."""
    charts = []
    for variant in study.config.variants:
        rows = [r for r in found["rungs"] if r["variant"] == variant and r["main"] and r["tried"]]
        series = tuple(
            _curve(row, batch)
            for row in rows
            for batch in dict.fromkeys(t["batch"] for t in row["tried"])
        )
        charts.append(
            Chart(
                name=f"search-{variant}",
                title=f"{variant}: loss over the learning rate",
                x_label="lr",
                y_label="held-out loss (nats per token)",
                series=series,
                log_x=True,
                caption="Mean over the seeds of the search.",
            )
        )
    blocks = drawn(*charts)
    return [Section(title="How settings were found", blocks=tuple(blocks))] if blocks else []


def _curve(row: Mapping[str, Any], batch: int | None) -> Series:
    points = [
        (tried["lr"], sum(tried["losses"].values()) / len(tried["losses"]))
        for tried in row["tried"]
        if tried["batch"] == batch and tried["losses"] and None not in tried["losses"].values()
    ]
    name = row["rung"] if batch is None else f"{row['rung']}, batch {batch:,}"
    x, y = zip(*points, strict=True) if points else ((), ())
    return Series(name=name, x=x, y=y, kind="both")


def _law_sections(
    part: str, prefix: str, laws: Mapping[str, Findings | str], names: Mapping[str, str]
) -> list[Section]:
    """Return the law by the first way of counting whole, and of all ways the numbers."""
    fitted = {name: law for name, law in laws.items() if isinstance(law, Findings)}
    if not fitted:
        why = next(iter(laws.values()))
        return [Section(title="No law", blocks=(Text(f"{why}."),), part=part)]
    first = next(iter(fitted))
    rows = tuple(
        (names[name], fit.name, value.name, format_significant(value.value), format_ends(value))
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
            format_ends(row),
        )
        for name, law in fitted.items()
        for ratio in law.ratios
        for row in ratio.rows
        if not row.extrapolated
    )
    blocks: list[Block] = [
        Table(
            head=("counted", "optimizer", "what", "value", "90 % interval"),
            rows=rows,
            name=f"{prefix}-conventions",
        )
    ]
    if ratios:
        head = ("counted", "of", "FLOPs", "ratio at equal loss", "90 % interval")
        blocks.append(Table(head=head, rows=ratios, name=f"{prefix}-ratios"))
    conventions = Section(title="By every way of counting", blocks=tuple(blocks), part=part)
    whole = fit_sections(fitted[first], f"{prefix}-", part)
    said = Text(f"Counted here: {names[first]}.")
    whole[0] = Section(title=whole[0].title, blocks=(said, *whole[0].blocks), part=part)
    return [*whole, conventions]
