"""The report of a batch study."""

from __future__ import annotations

from collections.abc import Iterator

from muonscale.lab.fits.bootstrap import CONFIDENCE
from muonscale.lab.fits.findings import format_significant
from muonscale.lab.fits.rising import SIGNIFICANT
from muonscale.lab.report.page import Block, Page, PageSection, Table, Text, Tile, Verdict
from muonscale.lab.studies.batch.charts import law_charts, predicted_chart, ratio_chart
from muonscale.lab.studies.batch.config import BatchConfig
from muonscale.lab.studies.batch.laws import TOLERANCE
from muonscale.lab.studies.batch.noise import noise_blocks
from muonscale.lab.studies.frontier.report import report_frontier
from muonscale.lab.studies.report_blocks import (
    Found,
    begin_with_result,
    format_interval,
    format_or_dash,
)
from muonscale.lab.studies.search.report import (
    about_search,
    format_setting,
    search_blocks_by_variant,
)

CHOSEN = (
    "The hardest target is the largest final loss over optimizers and batch sizes, so that all "
    "reach it. The easier ones are a quarter and a half of the way from there to the lowest loss "
    "that a run had at its first evaluation. All are rounded up to 0.01."
)
METHOD = (
    f"Intervals are {CONFIDENCE:.0%}. A target is read between two evaluations, never beyond the last. "
    "Runs of one seed share initial weights, order of the data and validation split, so ratios are "
    "taken seed by seed, with one noise for all batch sizes."
)
RULE = (
    "The ratio does not decrease if no drop between two batch sizes is significant (p < "
    f"{SIGNIFICANT:g} after Holm's correction for the number of pairs) and the {CONFIDENCE:.0%} "
    "interval of its slope over log B is at or above 0; it decreases if a drop is significant. The "
    "ratio is above 1 if its interval at every batch size is above 1; it is not if it is below 1 "
    f"at one of them, with p < {SIGNIFICANT:g} after Holm's correction. The claims are those of "
    "Practical Efficiency of Muon, arXiv 2505.02222, section 3."
)
DEFINITIONS = (
    "Emin/Smin: the batch at which steps and tokens are both twice their least (McCandlish et al., "
    "arXiv 1812.06162), and the batch with 20 % more tokens than the smallest by the same law "
    "(Zhang et al., arXiv 2410.21676). B*: the end of constant tokens in the model of three "
    "regimes (arXiv 2505.02222, appendix F). Token-optimal: the largest measured batch with the "
    f"fewest tokens (section 3.2 there), and the largest within {TOLERANCE:.0%} of them."
)


def report_batches(config: BatchConfig, found: Found) -> Page:
    """Return the report of the findings of `BatchStudy.analyze`."""
    targets = found["targets"]
    sections = [_report_claims(targets)]
    if ratios := [*ratio_chart(targets, config.baseline), *_ratio_tables(config, targets)]:
        sections.append(PageSection(title="Ratio of tokens", blocks=tuple(ratios)))
    if targets:
        sections.append(_report_critical(targets, found["noise_scale"]))
    for place, target in enumerate(targets):
        blocks = (
            *_remarks(target),
            _tokens_table(target, place),
            *law_charts(target, place),
            _laws_table(target, place),
            *predicted_chart(target, config.baseline, place),
            *_exponents(target, place),
        )
        sections.append(PageSection(title=f"To a loss of {target['target']:g}", blocks=blocks))
    sections.append(report_frontier(found["frontier"]))
    settings = search_blocks_by_variant(config.search, found["searches"])
    sections.append(PageSection(title="How settings were found", blocks=tuple(settings)))
    sections.append(_about(config, found))
    low, high = config.batches[0], config.batches[-1]
    page = Page(
        title=f"{', '.join(config.others)} and {config.baseline} by batch size",
        summary=f"Tokens and steps to a loss at batch sizes from {low:,} to {high:,} tokens, "
        f"at the best setting of each, {len(config.seeds)} seeds.",
        sections=tuple(sections),
    )
    hardest = [block for block in sections[0].blocks if isinstance(block, Verdict)]
    if targets:
        hardest = hardest[-sum(len(ratio["claims"]) for ratio in targets[-1]["ratios"]) :]
    return begin_with_result(page, hardest, _tiles(config, targets), "ratio")


def _tiles(config: BatchConfig, targets: list[Found]) -> Iterator[Tile]:
    """Yield the ratio of tokens at the largest batch that has one, to every loss."""
    for target in targets:
        for ratio in target["ratios"]:
            rows = [r for r in ratio["rows"] if r["ratio"] is not None and not r["censored"]]
            if rows:
                ends = "" if rows[-1]["low"] is None else f", {format_interval(rows[-1], '.2f')}"
                note = f"tokens to {target['target']:g} at a batch of {rows[-1]['batch']:,}{ends}"
                label = f"{config.baseline} / {ratio['other']}"
                yield Tile(label=label, value=f"{rows[-1]['ratio']:.2f}", note=note)


def _about(config: BatchConfig, found: Found) -> PageSection:
    blocks: list[Block] = [
        *about_search(config.search, config.variants),
        Text(
            "A setting is the best if its loss at the end of the run is lowest, and holds for all "
            f"targets. It was run with seeds {', '.join(map(str, config.seeds))}. {METHOD}"
        ),
    ]
    blocks += [Text(CHOSEN)] * found["chosen"]
    blocks += [Text(note) for note in found["notes"]]
    return PageSection(title="What was compared", blocks=tuple(blocks))


def _report_claims(targets: list[Found]) -> PageSection:
    blocks = [
        Verdict(claim["passed"], f"Loss {target['target']:g}: {claim['text']}.")
        for target in targets
        for ratio in target["ratios"]
        for claim in ratio["claims"]
    ]
    rule = Text(RULE) if blocks else Text("No run has ended yet.")
    return PageSection(title="Claims of the paper", blocks=(*blocks, rule))


def _ratio_tables(config: BatchConfig, targets: list[Found]) -> list[Table]:
    pairs = [(target, ratio) for target in targets for ratio in target["ratios"]]
    tables = []
    for place, (target, ratio) in enumerate(pairs):
        rows = []
        for row in ratio["rows"]:
            value = f"{row['censored']} {format_or_dash(row['ratio'], '.3f')}".strip()
            rows.append((f"{row['batch']:,}", value, format_interval(row, ".3f")))
        title = f"{config.baseline} / {ratio['other']} to {target['target']:g}"
        tables.append(
            Table(
                name=f"ratios-{ratio['other']}-{place}",
                head=("batch", title, "interval"),
                rows=tuple(rows),
                caption="With > only the second reached the loss, with < only the first.",
            )
        )
    return tables


def _report_critical(targets: list[Found], noise: list[Found]) -> PageSection:
    rows = [
        row
        for target in targets
        for variant in target["variants"]
        for law in ("mccandlish", "regimes", "optimal")
        for row in _critical_rows(target, variant, law)
    ]
    head = ("loss", "variant", "what", "value", "interval", "remark")
    table = Table(name="critical", head=head, rows=tuple(rows))
    return PageSection(
        title="Critical batch sizes", blocks=(table, Text(DEFINITIONS), *noise_blocks(noise))
    )


def _critical_rows(target: Found, variant: Found, law: str) -> Iterator[tuple[str, ...]]:
    found, where = variant[law], (f"{target['target']:g}", variant["name"])
    if found["refused"]:
        yield (*where, found["name"], "-", "-", found["refused"])
        return
    kept = [place["batch"] for place in variant["places"] if place["tokens"] is not None]
    for e in found["estimates"]:
        if e["name"] in ("Smin", "Emin", "tokens up to B*", "m"):
            continue
        outside = "extrapolated" if e["extrapolated"] and not found["remark"] else ""
        interval = "-"
        if not found["without_intervals"]:  # no measured batch size bounds an end that is open
            low = f"below {kept[0]}" if not e["low"] else format_significant(e["low"])
            high = f"above {kept[-1]}" if e["high"] is None else format_significant(e["high"])
            interval = f"{low} to {high}"
        value = "-" if e["value"] is None else format_significant(e["value"])
        notes = (outside, found["remark"], found["without_intervals"])
        yield (*where, e["name"], value, interval, "; ".join(filter(None, notes)))


def _remarks(target: Found) -> Iterator[Text]:
    places = [(v["name"], p) for v in target["variants"] for p in v["places"]]
    edges = [f"{n} at {p['batch']:,} ({', '.join(p['edges'])})" for n, p in places if p["edges"]]
    if edges:
        yield Text(
            f"The best setting is at an edge of those tried for {'; '.join(edges)}: nothing is "
            "claimed. Raise search.most and run the study again."
        )
    if target["freedom"] == 0:
        yield Text(
            "The noise of seeds is not known: it takes two seeds that reach the loss at two batch "
            "sizes."
        )


def _tokens_table(target: Found, place: int) -> Table:
    rows = []
    for variant in target["variants"]:
        for p in variant["places"]:
            if p["tokens"] is None:
                bound = "" if p["bound"] is None else f" {p['bound']:,.0f}"
                cells = ("-", "", f"{p['state']}{bound}", "-", "-")
            else:
                steps = format_significant(p["tokens"] / p["batch"])
                ends = format_interval(p, ",.0f")
                setting = format_setting(p["values"])
                cells = (setting, ", ".join(p["edges"]), f"{p['tokens']:,.0f}", ends, steps)
            rows.append((variant["name"], f"{p['batch']:,}", *cells))
    return Table(
        name=f"tokens-{place}",
        head=("variant", "batch", "best setting", "edge", "tokens", "interval", "steps"),
        rows=tuple(rows),
        caption="With > the loss was not reached by the end of the runs, with < it was reached at "
        "a first evaluation: give more evaluations or a harder target. Intervals leave out the "
        f"luck of the seed. Noise of log tokens: {format_or_dash(target['sigma'], '.3g')}, "
        f"{target['freedom']} degrees of freedom.",
    )


def _laws_table(target: Found, place: int) -> Table:
    rows = []
    for variant in target["variants"]:
        for law in ("mccandlish", "regimes"):
            found = variant[law]
            for e in found["estimates"]:
                value = "-" if e["value"] is None else format_significant(e["value"])
                misses = "" if found["rms"] is None else f"{found['rms']:.2%}"
                ends = format_interval(e, ".4g")
                rows.append((variant["name"], found["name"], e["name"], value, ends, misses))
    return Table(
        name=f"laws-{place}",
        head=("variant", "law", "what", "value", "interval", "residuals"),
        rows=tuple(rows),
        caption="Residuals are root mean squares of log S; compare them with the noise of log "
        "tokens.",
    )


def _exponents(target: Found, place: int) -> list[Table]:
    rows = tuple(
        (ratio["other"], e["name"], format_significant(e["value"]), format_interval(e, ".3g"))
        for ratio in target["ratios"]
        for e in ratio["exponents"]
    )
    table = Table(
        name=f"exponents-{place}",
        head=("variant", "regime", "exponent of B in the ratio", "interval"),
        rows=rows,
        caption="By the three-regime laws of both. If the last exponent is not below 0, the "
        "advantage does not vanish beyond both critical batch sizes.",
    )
    return [table] if rows else []
