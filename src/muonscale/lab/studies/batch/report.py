"""The report of a batch study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from muonscale.lab.fits.bootstrap import LEVEL
from muonscale.lab.fits.findings import format_significant
from muonscale.lab.fits.rising import SIGNIFICANT
from muonscale.lab.report.page import Block, Page, Section, Table, Text, Verdict
from muonscale.lab.studies.batch.charts import Tree, law_charts, predicted_chart, ratio_chart
from muonscale.lab.studies.batch.laws import TOLERANCE
from muonscale.lab.studies.batch.noise import noise_blocks
from muonscale.lab.studies.frontier.report import frontier_sections
from muonscale.lab.studies.report_blocks import command_block, failures_section, versions_section
from muonscale.lab.studies.study import Outcomes

if TYPE_CHECKING:
    from muonscale.lab.studies.batch.study import BatchConfig

RULES = {
    "sqrt": "multiplied by the square root of batch / {reference:,}",
    "linear": "multiplied by batch / {reference:,}",
    "none": "the same at all batch sizes",
}
CHOSEN = (
    "The hardest target is the largest final loss over optimizers and batch sizes, each at the learning rate "
    "with the lowest, so that all reach it; the easier ones lie a quarter and a half of the way from there to "
    "the lowest loss that a run had at its first evaluation. All are rounded up to 0.01."
)
METHOD = (
    f"Intervals are {LEVEL:.0%}. A target is read between two evaluations, never beyond the last. Of each "
    "batch size counts the learning rate with the least mean log tokens, all of whose seeds reach the "
    "target. Runs of one seed share initial weights, order of the data and held-out split, so ratios are "
    "taken seed by seed, with one noise for all batch sizes. The learning rate is picked by the tokens that "
    "are then compared, in all optimizers alike."
)
RULE = (
    f"That the ratio does not decrease holds if no drop between two batch sizes is significant "
    f"(p < {SIGNIFICANT:g} after Holm's correction for the number of pairs) and the {LEVEL:.0%} interval of its "
    "slope over log B lies at or above 0; it does not hold if a drop is significant. That it is above 1 "
    "holds if the interval at every batch size lies above 1; it does not if it is below 1 at one, with "
    f"p < {SIGNIFICANT:g} after Holm's correction. The claims are those of Practical Efficiency of Muon, arXiv "
    "2505.02222, section 3."
)
DEFINITIONS = (
    "Emin/Smin: where steps and tokens are both twice their least (McCandlish et al., arXiv 1812.06162), and "
    "the batch with 20 % more tokens than the smallest by the same law (Zhang et al., arXiv 2410.21676). "
    "B*: up to where tokens are constant, in the model of three regimes (arXiv 2505.02222, appendix F). "
    "Token-optimal: the largest measured batch with the fewest tokens (section 3.2 there), and the largest "
    f"within {TOLERANCE:.0%} of them."
)


def batch_page(config: BatchConfig, found: Mapping[str, Any], outcomes: Outcomes) -> Page:
    """Return the report of what `Batch.analyse` found."""
    targets = found["targets"]
    sections = [_about(config, found), _verdicts(targets)]
    if ratios := [*ratio_chart(targets, config.baseline), *_ratio_tables(config, targets)]:
        sections.append(Section(title="Ratio of tokens", blocks=tuple(ratios)))
    if targets:
        sections.append(_critical(targets, found["noise_scale"]))
    sections += [_target(config, target, place) for place, target in enumerate(targets)]
    sections += frontier_sections(found["frontier"])
    sections += [*failures_section(found), versions_section(outcomes)]
    low, high = config.batches[0], config.batches[-1]
    return Page(
        title=f"{', '.join(config.others)} and {config.baseline} by batch size",
        summary=f"Tokens and steps to a loss at batch sizes from {low:,} to {high:,} tokens, "
        f"{len(config.lr)} learning rates and {len(config.seeds)} seeds each.",
        sections=tuple(sections),
    )


def _about(config: BatchConfig, found: Mapping[str, Any]) -> Section:
    rates = tuple(
        (name, ", ".join(f"{lr:g}" for lr in config.lr_of.get(name, config.lr)))
        for name in config.variants
    )
    rule = RULES[config.lr_rule].format(reference=config.reference)
    blocks: list[Block] = [
        command_block(config),
        Table(head=("variant", f"learning rates at a batch of {config.reference:,}"), rows=rates),
        Text(f"Learning rates are {rule}. {METHOD}"),
    ]
    if found["chosen"]:
        blocks.append(Text(CHOSEN))
    blocks += [Text(note) for note in found["notes"]]
    return Section(title="What was compared", blocks=tuple(blocks))


def _verdicts(targets: list[Tree]) -> Section:
    blocks: list[Block] = [
        Verdict(claim["passed"], f"Loss {target['target']:g}: {claim['text']}.")
        for target in targets
        for ratio in target["ratios"]
        for claim in ratio["claims"]
    ]
    return Section(
        title="What the paper claims",
        blocks=(*blocks, Text(RULE)) if blocks else (Text("No run has ended yet."),),
    )


def _ratio_tables(config: BatchConfig, targets: list[Tree]) -> list[Block]:
    names = [(target, ratio) for target in targets for ratio in target["ratios"]]
    return [
        Table(
            name=f"ratios-{ratio['other']}-{place}",
            head=(
                "batch",
                f"{config.baseline} / {ratio['other']} to {target['target']:g}",
                "interval",
            ),
            rows=tuple(
                (
                    f"{row['batch']:,}",
                    "-"
                    if row["ratio"] is None
                    else f"{row['censored']} {row['ratio']:.3f}".strip(),
                    _ends(row, ".3f"),
                )
                for row in ratio["rows"]
            ),
            caption="With > only the second reached the loss, with < only the first.",
        )
        for place, (target, ratio) in enumerate(names)
    ]


def _critical(targets: list[Tree], noise: list[Tree]) -> Section:
    rows = []
    for target in targets:
        for variant in target["variants"]:
            for law in ("mccandlish", "regimes", "optimal"):
                rows += _law_rows(target, variant, law)
    return Section(
        title="Critical batch sizes",
        blocks=(
            Table(
                name="critical",
                head=("loss", "variant", "what", "value", "interval", "remark"),
                rows=tuple(rows),
            ),
            Text(DEFINITIONS),
            *noise_blocks(noise),
        ),
    )


def _law_rows(target: Tree, variant: Tree, law: str) -> list[tuple[str, ...]]:
    found, where = variant[law], (f"{target['target']:g}", variant["name"])
    if found["refused"]:
        return [(*where, found["name"], "-", "-", found["refused"])]
    kept = [place["batch"] for place in variant["places"] if place["tokens"] is not None]
    remark = "; ".join(part for part in (found["remark"], found["without_intervals"]) if part)
    rows: list[tuple[str, ...]] = []
    for estimate in found["estimates"]:
        if estimate["name"] in ("Smin", "Emin", "tokens up to B*", "m"):
            continue
        outside = "extrapolated" if estimate["extrapolated"] and not found["remark"] else ""
        interval = "-" if found["without_intervals"] else _open_ends(estimate, kept)
        value = "-" if estimate["value"] is None else format_significant(estimate["value"])
        note = "; ".join(part for part in (outside, remark) if part)
        rows.append((*where, estimate["name"], value, interval, note))
    return rows


def _open_ends(estimate: Tree, kept: list[int]) -> str:
    """Return an interval; an end that no measured batch size bounds is said to be open."""
    low = f"below {kept[0]}" if not estimate["low"] else format_significant(estimate["low"])
    high = f"above {kept[-1]}" if estimate["high"] is None else format_significant(estimate["high"])
    return f"{low} to {high}"


def _ends(row: Tree, form: str) -> str:
    return "-" if row["low"] is None else f"{row['low']:{form}} to {row['high']:{form}}"


def _target(config: BatchConfig, target: Tree, place: int) -> Section:
    blocks: list[Block] = [*_remarks(target), _tokens_table(target, place)]
    blocks += [*law_charts(target, place), _laws_table(target, place)]
    blocks += predicted_chart(target, config.baseline, place)
    blocks += _exponents(target, place)
    return Section(title=f"To a loss of {target['target']:g}", blocks=tuple(blocks))


def _remarks(target: Tree) -> list[Block]:
    places = [(v["name"], p) for v in target["variants"] for p in v["places"]]
    edges = [f"{name} at {p['batch']:,} ({p['edge']})" for name, p in places if p["edge"]]
    blocks: list[Block] = []
    if edges:
        blocks.append(
            Text(
                f"The best learning rate is the lowest or highest that was tried: {', '.join(edges)}. "
                "Fewer tokens may be needed beyond, and what is said of these may change."
            )
        )
    if target["freedom"] == 0:
        blocks.append(
            Text(
                "Without two seeds at two batch sizes there is no noise to judge by: give two seeds."
            )
        )
    return blocks


def _tokens_table(target: Tree, place: int) -> Table:
    rows = []
    for variant in target["variants"]:
        for p in variant["places"]:
            rows.append((variant["name"], f"{p['batch']:,}", *_spent(p)))
    sigma = "-" if target["sigma"] is None else f"{target['sigma']:.3g}"
    return Table(
        name=f"tokens-{place}",
        head=("variant", "batch", "best lr", "edge", "tokens", "interval", "steps"),
        rows=tuple(rows),
        caption=f"With > it was not reached by the end of the runs, with < it was at a first evaluation: give "
        f"more evaluations or a harder target. The intervals leave out the luck of the seed. Noise of log "
        f"tokens: {sigma}, {target['freedom']} degrees of freedom.",
    )


def _spent(p: Tree) -> tuple[str, ...]:
    if p["tokens"] is None:
        bound = "" if p["bound"] is None else f" {p['bound']:,.0f}"
        return ("-", "", f"{p['state']}{bound}", "-", "-")
    ends = "-" if p["low"] is None else f"{p['low']:,.0f} to {p['high']:,.0f}"
    steps = format_significant(p["tokens"] / p["batch"])
    return (f"{p['lr']:g}", p["edge"] or "", f"{p['tokens']:,.0f}", ends, steps)


def _laws_table(target: Tree, place: int) -> Table:
    rows = []
    for variant in target["variants"]:
        for law in ("mccandlish", "regimes"):
            found = variant[law]
            for estimate in found["estimates"]:
                ends = _ends({**estimate, "high": _infinite(estimate["high"])}, ".4g")
                misses = "" if found["rms"] is None else f"{found['rms']:.2%}"
                value = "-" if estimate["value"] is None else format_significant(estimate["value"])
                rows.append((variant["name"], found["name"], estimate["name"], value, ends, misses))
    return Table(
        name=f"laws-{place}",
        head=("variant", "law", "what", "value", "interval", "residuals"),
        rows=tuple(rows),
        caption="Residuals are root mean squares of log S; compare them with the noise of log tokens.",
    )


def _infinite(value: float | None) -> float:
    return float("inf") if value is None else value


def _exponents(target: Tree, place: int) -> list[Block]:
    rows = tuple(
        (ratio["other"], e["name"], format_significant(e["value"]), _ends(e, ".3g"))
        for ratio in target["ratios"]
        for e in ratio["exponents"]
    )
    if not rows:
        return []
    return [
        Table(
            name=f"exponents-{place}",
            head=("variant", "regime", "exponent of B in the ratio", "interval"),
            rows=rows,
            caption="By the three-regime laws of both. If the last is not below 0 the advantage does not "
            "vanish beyond both critical batch sizes.",
        )
    ]
