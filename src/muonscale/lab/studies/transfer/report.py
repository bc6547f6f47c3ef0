"""The report of a transfer study."""

from __future__ import annotations

from muonscale.lab.report.page import Chart, Page, PageSection, Table, Text, Tile, Verdict
from muonscale.lab.studies.report_blocks import (
    LOSS,
    Found,
    begin_with_result,
    format_interval,
    format_or_dash,
    interval_series,
    keep_nonempty,
    seed_series,
)
from muonscale.lab.studies.search.report import about_search, search_blocks
from muonscale.lab.studies.transfer.config import TransferConfig

NAMES = {"lr": "learning rate", "wd": "weight decay"}


def report_transfer(config: TransferConfig, found: Found) -> Page:
    """Return the report of the findings of `TransferStudy.analyze`."""
    curves, name = found["curves"], NAMES[config.name]
    verdicts, tiles = [], []
    for c in curves:
        says = {True: "transfers", False: "does not transfer", None: "undecided"}[c["transfers"]]
        if known := [w for w in c["widths"] if w["optimum"] is not None]:
            ends = (f"{w['optimum']:.3g} at width {w['width']}" for w in (known[0], known[-1]))
            tiles.append(Tile(label=_title(c), value=says, note=f"optimum {', '.join(ends)}"))
        verdicts.append(Verdict(c["transfers"], f"{_title(c)}: {says}; {c['why']}"))
    rule = Text(
        f"The {name} transfers if its optimum at every width is less than one step of the grid "
        "from that at the first width, and is never the lowest or highest value that was tried. At "
        "the first width nothing is multiplied, and all conventions share its runs."
    )
    charts = tuple(keep_nonempty(*(_curve_chart(name, curve) for curve in curves)))
    page = Page(
        title=f"Transfer of the {name} over widths {config.widths[0]} to {config.widths[-1]}",
        summary=f"The best {name} at widths {', '.join(map(str, config.widths))}, by optimizer and "
        "convention.",
        sections=(
            PageSection(title="Verdicts", blocks=(*verdicts, rule)),
            _report_optima(name, curves),
            *([PageSection(title=f"Loss by {name}", blocks=charts)] if charts else ()),
            *_report_search(config, found),
        ),
    )
    return begin_with_result(page, verdicts, tiles, "optimum")


def _report_search(config: TransferConfig, found: Found) -> list[PageSection]:
    if config.search is None:
        return []
    blocks = (
        *about_search(config.search, config.variants),
        *search_blocks(found["searches"], config.search.keys),
    )
    return [PageSection(title="How the other keys were found", blocks=blocks)]


def _title(curve: Found) -> str:
    return f"{curve['variant']}, {curve['convention']}"


def _report_optima(name: str, curves: list[Found]) -> PageSection:
    optima, losses, rows = [], [], []
    for curve in curves:
        known = [w for w in curve["widths"] if w["optimum"] is not None]
        bars = [
            {**w, "low": w["low"] or w["optimum"], "high": w["high"] or w["optimum"]} for w in known
        ]
        optima.append(interval_series(_title(curve), bars, "width", "optimum"))
        measured = [w for w in curve["widths"] if w["loss"] is not None]
        losses.append(interval_series(_title(curve), measured, "width", "loss", ends=None))
        rows += [
            (
                curve["variant"],
                curve["convention"],
                str(w["width"]),
                format_or_dash(w["optimum"], ".3g"),
                format_interval(w, ".3g"),
                format_or_dash(w["best"], "g"),
                w["edge"] or "",
                format_or_dash(w["loss"]),
            )
            for w in curve["widths"]
        ]
    charts = keep_nonempty(
        Chart(
            name="optimum",
            title=f"Best {name} by width",
            x_label="width",
            y_label=name,
            log_x=True,
            log_y=True,
            series=tuple(optima),
            caption="The value before it is multiplied: transfer predicts a flat line. Bars are 90 "
            "% intervals from the noise of seeds. Points without a bar are values that were tried, "
            "at an edge or beside a run that diverged.",
        ),
        Chart(
            name="best-loss",
            title="Best loss by width",
            x_label="width",
            y_label=LOSS,
            log_x=True,
            series=tuple(losses),
            caption="Mean over seeds at the best value that was tried.",
        ),
    )
    head = (
        *("optimizer", "convention", "width", "optimum", "interval"),
        *("best tried", "edge", "loss"),
    )
    table = Table(name="optima", head=head, rows=tuple(rows))
    return PageSection(title="Optimum by width", blocks=(*charts, table))


def _curve_chart(name: str, curve: Found) -> Chart:
    series = [seed_series(f"width {w['width']}", w["points"], "value") for w in curve["widths"]]
    minima = [w for w in curve["widths"] if w["best"] is not None]
    series.append(interval_series("lowest", minima, "best", "loss", ends=None, kind="dashed"))
    return Chart(
        name=f"curves-{curve['variant']}-{curve['convention']}",
        title=_title(curve),
        x_label=name,
        y_label=LOSS,
        log_x=True,
        series=tuple(series),
        caption="Mean over seeds; bars reach from the lowest to the highest. The dashed line joins "
        "the minima.",
    )
