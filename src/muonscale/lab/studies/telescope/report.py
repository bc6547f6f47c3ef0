"""The report of a telescope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from muonscale.lab.report.page import Block, Page, Section, Table, Text, Verdict
from muonscale.lab.studies.account import (
    account_rows,
    account_sentences,
    hours_text,
    read_account,
)
from muonscale.lab.studies.analysis.seed_blocks import LEVEL
from muonscale.lab.studies.report_blocks import command_block, failures_section, versions_section
from muonscale.lab.studies.study import Outcomes
from muonscale.lab.studies.telescope.charts import (
    drift_chart,
    law_chart,
    level_charts,
    number_text,
    u_curves,
)
from muonscale.lab.studies.telescope.full_sweep import LARGEST_SHARE

if TYPE_CHECKING:
    from muonscale.lab.studies.telescope.config import TelescopeConfig

Found = Mapping[str, Any]


def telescope_page(config: TelescopeConfig, found: Found, outcomes: Outcomes) -> Page:
    """Return the report of what `Telescope.analyse` found."""
    sections = [
        Section(title="What was found", blocks=(*_verdicts(found), *_answer(found))),
        _about(config),
        _levels(config, found),
        _drift(config, found),
        _loss(found),
        *_brute_force(found),
        _account(found),
        *failures_section(found),
        versions_section(outcomes),
    ]
    names = " and ".join(config.hyperparameters)
    return Page(
        title=f"Telescoping {names} to width {config.target_width}",
        summary=f"Grids of {names} from width {config.base_width} to {config.calibration_width}, for a model "
        f"of width {config.target_width}.",
        sections=tuple(sections),
    )


def _verdicts(found: Found) -> list[Block]:
    blocks: list[Block] = []
    if found["stopped"]:
        blocks.append(Verdict(False, f"Stopped at {found['stopped']}."))
    if found["stop_earlier"] is not None:
        said = found["stop_earlier"]["said"]
        passed = True if found["stop_earlier"]["width"] is not None else None
        blocks.append(Verdict(passed, f"{said[0].upper()}{said[1:]}."))
    brute = found["brute_force"]
    if brute is not None:
        blocks.append(Verdict(brute["passed"], _brute_sentence(brute)))
    return blocks


def _brute_sentence(brute: Found) -> str:
    within = {True: "no more than", False: "beyond", None: "not comparable with"}
    share = brute["flops"][0] / brute["flops"][1]
    return (
        f"At width {brute['width']} the loss of the telescope's choice is {brute['difference']:+.4f} nats off "
        f"the lowest of a full sweep ({_interval(brute)}), {within[brute['within_noise']]} seed noise, at "
        f"{share:.0%} of its FLOPs; no more than {LARGEST_SHARE:.0%} are asked for."
    )


def _interval(part: Found) -> str:
    if part["low"] is None:
        return "no interval"
    return f"{LEVEL:.0%} {part['low']:+.4f} to {part['high']:+.4f}"


def _answer(found: Found) -> list[Block]:
    if found["chosen"] is None:
        return [Text("There is no optimum of the last width yet.")]
    values = ", ".join(f"{name} {value:g}" for name, value in found["chosen"].items())
    losses = found["target"]["losses"]
    text = f"Chosen: {values}, as values of the base width."
    if losses:
        each = ", ".join(f"{number_text(loss)} (seed {seed})" for seed, loss in losses.items())
        text += f" Held-out loss of the target: {each} nats per token."
    return [Text(text)]


def _about(config: TelescopeConfig) -> Section:
    rows = tuple(
        (name, item.key, f"{item.centre:g}", f"{item.ratio:g}")
        for name, item in config.hyperparameters.items()
    )
    rule = config.rule
    text = (
        f"The grid of the base width has {config.points} values of each. At every doubling of the width the "
        "values become fewer by 4^(-1/k), up to the next odd number, and lie half as far apart on a "
        "logarithmic scale, around the optimum before, the place of the lowest mean loss. Where that is at "
        "an end and its loss is told apart from the lowest inside, a line of places is added, at most "
        f"{config.extend} at a width; a study that would need more stops. Where it is not told apart, the "
        "place inside is the optimum. Depth, tokens and batch are the same at all widths. Values are those of the base width: "
        f"the others are multiplied as transfer.convention={config.convention} says."
    )
    seeds = (
        f"Every place was run with {'seeds' if len(config.seeds) > 1 else 'seed'} "
        f"{', '.join(map(str, config.seeds))}. Intervals are {LEVEL:.0%}, of the noise that is left when the "
        "effect of the seed is taken out, around the best place of a width."
    )
    head = ("hyper-parameter", "key", "first centre", "first ratio")
    blocks = (command_block(config), Table(head=head, rows=rows), Text(text), Text(seeds))
    return Section(
        title=f"Widths {', '.join(map(str, rule.widths))}, then {config.target_width}",
        blocks=blocks,
    )


def _levels(config: TelescopeConfig, found: Found) -> Section:
    charts: list[Block] = [u_curves(found, name) for name in config.hyperparameters]
    for number, level in enumerate(found["levels"]):
        charts += level_charts(config, level, number)
    notes = [
        Text(f"Width {level['width']}: {optimum['note']}.")
        for level in found["levels"]
        for optimum in level["optima"].values()
        if optimum["note"] and max(level["shape"]) > 1
    ]
    return Section(
        title="The optimum at every width", blocks=(_level_table(found), *notes, *charts)
    )


def _level_table(found: Found) -> Table:
    names = list(found["hyperparameters"])
    rows = []
    for level in found["levels"]:
        cells = [str(level["width"]), " x ".join(map(str, level["shape"])), str(level["lines"])]
        for name in names:
            best = level["best"]
            cells.append("-" if best is None else f"{best[name]:g}")
            cells.append(_optimum(level["optima"].get(name)))
        before = level["before"]
        cells += [number_text(level["loss"]), number_text(level["sigma"])]
        cells += ["-", "-"] if before is None else [_gap(before), _within(before)]
        rows.append(tuple(cells))
    both = [cell for name in names for cell in (name, f"{name} of the parabola")]
    head = (
        "width",
        "points",
        "lines added",
        *both,
        "loss",
        "noise",
        "optimum before",
        "within noise",
    )
    return Table(
        name="levels",
        head=head,
        rows=tuple(rows),
        caption="Optimum of every width and its mean loss, nats per token. The parabola goes through "
        "the best value and its neighbours, averaged over neighbouring values of the others. The optimum of the width before is the middle of the next "
        "grid: how much more its loss is than the lowest, and whether that is within seed noise, for as "
        "many places as it could have lost to.",
    )


def _optimum(optimum: Found | None) -> str:
    if optimum is None or optimum["at"] is None:
        return "-"
    if optimum["low"] is None:
        return f"{optimum['at']:.3g}"
    end = "" if optimum["closed"] else ", not closed"
    return f"{optimum['at']:.3g} ({optimum['low']:.3g} to {optimum['high']:.3g}{end})"


def _gap(before: Found) -> str:
    return "diverged" if before["gap"] is None else f"{before['gap']:+.4f}"


def _within(before: Found) -> str:
    return {True: "yes", False: "no", None: "-"}[before["within"]]


def _drift(config: TelescopeConfig, found: Found) -> Section:
    blocks: list[Block] = []
    rows = []
    for name, drift in found["drift"].items():
        if drift is None:
            continue
        blocks.append(drift_chart(found, name))
        cells = [_estimate(drift[key], ".3g") for key in ("base", "target", "infinite")]
        moves = {True: "yes", False: "not told apart", None: "-"}[drift["moves"]]
        rows.append((name, _estimate(drift["slope"], ".2f"), *cells, moves))
    if not rows:
        text = Text(
            "The widths do not tell how the optimum moves: two of them have to show a valley."
        )
        return Section(title="Drift of the optimum", blocks=(text,))
    head = (
        "hyper-parameter",
        "slope",
        f"at {config.base_width}",
        f"at {config.target_width}",
        "at infinite width",
        "moves",
    )
    caption = (
        "log optimum = c + slope / width: one fit to all widths of parabolas around their best places, with "
        "a curvature that they share. The points in the charts are of each width alone."
    )
    table = Table(name="drift", head=head, rows=tuple(rows), caption=caption)
    return Section(title="Drift of the optimum", blocks=(table, *blocks))


def _estimate(part: Found, form: str) -> str:
    if part["low"] is None:
        return format(part["value"], form)
    return f"{part['value']:{form}} ({part['low']:{form}} to {part['high']:{form}})"


def _loss(found: Found) -> Section:
    law, blocks = found["law"], []
    if law["note"]:
        blocks.append(Text(f"No law was fitted: {law['note']}."))
    else:
        offset = "offset" in law["parameters"]
        rows = tuple((name, _estimate(p, ".4g")) for name, p in law["parameters"].items())
        form = (
            "offset + coefficient * width^-exponent" if offset else "coefficient * width^-exponent"
        )
        caption = f"loss = {form}; fit: {law['status']}."
        blocks.append(Table(head=("parameter", "value"), rows=rows, name="law", caption=caption))
    return Section(title="Loss against width", blocks=(*blocks, law_chart(found)))


def _brute_force(found: Found) -> list[Section]:
    brute = found["brute_force"]
    if brute is None:
        return []
    names = list(found["hyperparameters"])
    rows = []
    choices = (
        ("telescope", found["chosen"], brute["telescoped"]),
        ("full sweep", brute["best"], brute["loss"]),
    )
    for number, (who, values, loss) in enumerate(choices):
        seconds = brute["seconds"][number]
        hours = hours_text(None if seconds is None else seconds / 3600)
        flops = f"{brute['flops'][number]:.3g}"
        rows.append((who, *(f"{values[n]:g}" for n in names), number_text(loss), flops, hours))
    blocks: list[Block] = [
        Table(
            name="full-sweep",
            head=("choice", *names, "loss", "FLOPs", "hours"),
            rows=tuple(rows),
            caption=f"At width {brute['width']}. The telescope's FLOPs and hours are those of all its levels.",
        ),
        Text("Each is the lowest of its own grid, which flatters the larger one."),
    ]
    if brute["at_end"]:
        blocks.append(Text("The lowest loss of the full sweep is at an end of its grid."))
    if brute["missing"]:
        blocks.append(Text(f"{brute['missing']} places of the full sweep have no loss."))
    return [Section(title="Against a full sweep", blocks=tuple(blocks))]


def _account(found: Found) -> Section:
    spent = read_account(found["account"])
    head, *rows = account_rows(spent)
    said = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in account_sentences(spent)]
    caption = "Hours are those of finished runs of the width, one after the other."
    table = Table(name="account", head=head, rows=tuple(rows), caption=caption)
    return Section(title="What it cost", blocks=(table, *(Text(sentence) for sentence in said)))
