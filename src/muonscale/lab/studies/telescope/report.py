"""The report of a telescope."""

from __future__ import annotations

from collections.abc import Iterator

from muonscale.lab.console import counted, si_text
from muonscale.lab.fits.bootstrap import CONFIDENCE
from muonscale.lab.report.page import Block, Page, PageSection, Table, Text, Tile, Verdict
from muonscale.lab.studies.cost import Account, AccountLine, format_hours
from muonscale.lab.studies.report_blocks import (
    Found,
    begin_with_result,
    format_interval,
    format_or_dash,
    format_with_interval,
)
from muonscale.lab.studies.telescope.charts import drift_chart, law_chart, level_charts, u_curves
from muonscale.lab.studies.telescope.config import TelescopeConfig
from muonscale.lab.studies.telescope.full_sweep import LARGEST_SHARE


def report_telescope(config: TelescopeConfig, found: Found) -> Page:
    """Return the report of the findings of `TelescopeStudy.analyze`."""
    names = " and ".join(config.hyperparameters)
    result = tuple(_result(found))
    page = Page(
        title=f"Telescoping {names} to width {config.target_width}",
        summary=f"Grids of {names} from width {config.base_width} to {config.calibration_width}, "
        f"for a model of width {config.target_width}.",
        sections=(
            PageSection(title="The choice", blocks=result),
            _about(config),
            _report_levels(config, found),
            _report_drift(config, found),
            _report_law(found["law"]),
            *_report_full_sweep(found),
            _report_cost(found),
        ),
    )
    verdicts = [block for block in result if isinstance(block, Verdict)]
    return begin_with_result(page, verdicts, _tiles(found), "loss-by-width")


def _tiles(found: Found) -> Iterator[Tile]:
    for name, value in (found["chosen"] or {}).items():
        yield Tile(label=f"chosen {name}", value=f"{value:g}", note="as a value of the base width")
    losses = [loss for loss in found["target"]["losses"].values() if loss is not None]
    if losses:
        loss, note = sum(losses) / len(losses), f"of the target, {counted(len(losses), 'seed')}"
        yield Tile(label="validation loss", value=f"{loss:.3f}", note=note)
    if (sweep := found["full_sweep"]) is not None:
        share = sweep["flops"][0] / sweep["flops"][1]
        note = f"of a full sweep's, {sweep['difference']:+.4f} nats from its lowest"
        yield Tile(label="FLOPs", value=f"{share:.0%}", note=note)


def _result(found: Found) -> Iterator[Block]:
    if found["stopped"]:
        yield Verdict(False, f"Stopped at {found['stopped']}.")
    if (early := found["stop_earlier"]) is not None:
        text = early["note"]
        yield Verdict(early["width"] is not None or None, f"{text[0].upper()}{text[1:]}.")
    if (sweep := found["full_sweep"]) is not None:
        interval = "no interval"
        if sweep["low"] is not None:
            interval = f"{CONFIDENCE:.0%} {format_interval(sweep, '+.4f')}"
        within = {True: "within", False: "beyond", None: "not comparable with"}
        share = sweep["flops"][0] / sweep["flops"][1]
        yield Verdict(
            sweep["passed"],
            f"At width {sweep['width']} the loss of the telescope's choice is "
            f"{sweep['difference']:+.4f} nats from the lowest of a full sweep ({interval}), "
            f"{within[sweep['within_noise']]} seed noise, at {share:.0%} of its FLOPs; at most "
            f"{LARGEST_SHARE:.0%} are allowed.",
        )
    if found["chosen"] is None:
        yield Text("There is no optimum of the last width yet.")
        return
    values = ", ".join(f"{name} {value:g}" for name, value in found["chosen"].items())
    text = f"Chosen: {values}, as values of the base width."
    if losses := found["target"]["losses"]:
        each = ", ".join(f"{format_or_dash(loss)} (seed {seed})" for seed, loss in losses.items())
        text += f" Validation loss of the target: {each} nats per token."
    yield Text(text)


def _about(config: TelescopeConfig) -> PageSection:
    rows = tuple(
        (name, item.key, f"{item.center:g}", f"{item.ratio:g}")
        for name, item in config.hyperparameters.items()
    )
    text = (
        f"The grid of the base width has {config.points} values of each hyper-parameter. At every "
        "doubling of the width their number shrinks by 4^(-1/k), rounded up to an odd number, and "
        "their spacing on a logarithmic scale halves, around the optimum before: the place of the "
        "lowest mean loss. If that place is at an end and significantly better than the lowest "
        f"inside, a line of places is added, at most {config.extend} at a width; a study that "
        "needs more stops. If it is not significantly better, the place inside is the optimum. "
        "Depth, tokens and batch are the same at all widths. Values are those of the base width; "
        f"at other widths they are multiplied as transfer.convention={config.convention} says."
    )
    seeds = (
        f"Every place was run with {'seeds' if len(config.seeds) > 1 else 'seed'} "
        f"{', '.join(map(str, config.seeds))}. Intervals are {CONFIDENCE:.0%}, from the noise around "
        "the best place of a width after the effect of the seed is removed."
    )
    head = ("hyper-parameter", "key", "first center", "first ratio")
    return PageSection(
        title=f"Widths {', '.join(map(str, config.rule.widths))}, then {config.target_width}",
        blocks=(Table(head=head, rows=rows), Text(text), Text(seeds)),
    )


def _report_levels(config: TelescopeConfig, found: Found) -> PageSection:
    names, rows, notes = list(found["hyperparameters"]), [], []
    surfaces = []
    for number, level in enumerate(found["levels"]):
        cells = [str(level["width"]), " x ".join(map(str, level["shape"])), str(level["lines"])]
        for name in names:
            best, optimum = level["best"], level["optima"].get(name)
            cells.append("-" if best is None else f"{best[name]:g}")
            cells.append(_format_optimum(optimum))
            if optimum is not None and optimum["note"] and max(level["shape"]) > 1:
                notes.append(Text(f"Width {level['width']}: {optimum['note']}."))
        cells += [format_or_dash(level["loss"]), format_or_dash(level["sigma"])]
        if (before := level["before"]) is None:
            cells += ["-", "-"]
        else:
            gap = "diverged" if before["gap"] is None else f"{before['gap']:+.4f}"
            cells += [gap, {True: "yes", False: "no", None: "-"}[before["within"]]]
        rows.append(tuple(cells))
        surfaces += level_charts(config, level, number)
    columns = [cell for name in names for cell in (name, f"{name} of the parabola")]
    table = Table(
        name="levels",
        head=(
            *("width", "points", "lines added", *columns),
            *("loss", "noise", "optimum before", "within noise"),
        ),
        rows=tuple(rows),
        caption="Optimum of every width and its mean loss, nats per token. The parabola goes "
        "through the best value and its neighbors, averaged over neighboring values of the others. "
        "The optimum of the width before is the middle of the next grid. The last columns say how "
        "far its loss is above the lowest, and whether that is within seed noise, corrected for "
        "the number of places that could be better.",
    )
    curves = [u_curves(found, name) for name in config.hyperparameters]
    return PageSection(
        title="The optimum at every width", blocks=(table, *notes, *curves, *surfaces)
    )


def _format_optimum(optimum: Found | None) -> str:
    if optimum is None or optimum["at"] is None:
        return "-"
    text = format_with_interval(optimum, ".3g", "at")
    return text if optimum["low"] is None or optimum["closed"] else f"{text[:-1]}, not closed)"


def _report_drift(config: TelescopeConfig, found: Found) -> PageSection:
    charts, rows = [], []
    for name, drift in found["drift"].items():
        if drift is not None:
            charts.append(drift_chart(found, name))
            cells = [
                format_with_interval(drift[key], ".3g") for key in ("base", "target", "infinite")
            ]
            moves = {True: "yes", False: "not significantly", None: "-"}[drift["moves"]]
            rows.append((name, format_with_interval(drift["slope"], ".2f"), *cells, moves))
    if not rows:
        text = Text("The drift cannot be fitted: at least two widths have to show a valley.")
        return PageSection(title="Drift of the optimum", blocks=(text,))
    places = (config.base_width, config.target_width, "infinite width")
    table = Table(
        name="drift",
        head=("hyper-parameter", "slope", *(f"at {place}" for place in places), "moves"),
        rows=tuple(rows),
        caption="log optimum = c + slope / width: one fit to all widths of parabolas around their "
        "best places, with a shared curvature. The points in the charts are fitted to each width "
        "alone.",
    )
    return PageSection(title="Drift of the optimum", blocks=(table, *charts))


def _report_law(law: Found) -> PageSection:
    if law["note"]:
        block: Block = Text(f"No law was fitted: {law['note']}.")
    else:
        offset = "offset + " if "offset" in law["parameters"] else ""
        block = Table(
            head=("parameter", "value"),
            rows=tuple((n, format_with_interval(p, ".4g")) for n, p in law["parameters"].items()),
            name="law",
            caption=f"loss = {offset}coefficient * width^-exponent; fit: {law['status']}.",
        )
    return PageSection(title="Loss against width", blocks=(block, law_chart(law)))


def _report_full_sweep(found: Found) -> list[PageSection]:
    if (sweep := found["full_sweep"]) is None:
        return []
    names, rows = list(found["hyperparameters"]), []
    choices = (
        ("telescope", found["chosen"], sweep["telescoped"]),
        ("full sweep", sweep["best"], sweep["loss"]),
    )
    for number, (who, values, loss) in enumerate(choices):
        seconds = sweep["seconds"][number]
        hours = format_hours(None if seconds is None else seconds / 3600)
        flops = si_text(sweep["flops"][number])
        rows.append((who, *(f"{values[n]:g}" for n in names), format_or_dash(loss), flops, hours))
    blocks: list[Block] = [
        Table(
            name="full-sweep",
            head=("choice", *names, "loss", "FLOPs", "time"),
            rows=tuple(rows),
            caption=f"At width {sweep['width']}. The telescope's FLOPs and time are those of all "
            "its levels.",
        ),
        Text("Each is the lowest of its own grid, which favors the larger grid."),
    ]
    if sweep["at_end"]:
        blocks.append(Text("The lowest loss of the full sweep is at an end of its grid."))
    if sweep["missing"]:
        blocks.append(Text(f"{sweep['missing']} places of the full sweep have no loss."))
    return [PageSection(title="Against a full sweep", blocks=tuple(blocks))]


def _report_cost(found: Found) -> PageSection:
    account = Account(tuple(AccountLine(**line) for line in found["account"]["lines"]))
    head, *rows = account.rows()
    texts = [Text(f"{text[0].upper()}{text[1:]}.") for text in account.sentences()]
    caption = "Hours are those of finished runs of the width, one after the other."
    table = Table(name="account", head=head, rows=tuple(rows), caption=caption)
    return PageSection(title="Cost", blocks=(table, *texts))
