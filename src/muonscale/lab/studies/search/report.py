"""What was searched, as blocks of a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from muonscale.lab.report.page import Block, Chart, Table, Text
from muonscale.lab.studies.report_blocks import LOSS, Found, interval_series, keep_nonempty
from muonscale.lab.studies.search.config import SearchSection

EDGE_ADVICE = "Raise search.most, or repeat failed runs with --retry, and run the study again."
"""What to do if the best setting is at an edge."""


def about_search(section: SearchSection, variants: Iterable[str]) -> list[Table | Text]:
    """Return which keys were searched, from where, and by which rule."""
    rows = []
    for variant in variants:
        for name in section.names(variant):
            item = section.keys[name]
            start = item.start_for(variant)
            rows.append((variant, name, item.key, f"{start:g}", f"{item.ratio:g}"))
    seeds = ", ".join(map(str, section.seeds))
    if section.at == "first":
        later = "The best settings of the first place hold for all others."
    elif section.begin == "previous":
        later = "The search of a later place begins at the best setting of the place before."
    else:
        later = "Every place is searched from the start."
    return [
        Table(
            name="searched",
            head=("variant", "name", "key", "start", "ratio of neighbors"),
            rows=tuple(rows),
        ),
        Text(
            "Settings were searched by coordinate descent: from the best setting so far, both "
            "neighbors along one key are tried, then along the next, and the search goes on from "
            "any that is lower, so that edges are extended. A variant is tuned if every neighbor "
            f"of its best setting was tried and is worse. All variants try equal numbers of settings "
            f"at a place: {section.settings} if that is enough for all to be tuned, else up to "
            f"{section.most}, with seeds {seeds}. {later}"
        ),
    ]


def format_setting(values: Mapping[str, float] | None) -> str:
    """Return the values of a setting as text, such as `lr 0.02, rest 0.01`."""
    return "-" if not values else ", ".join(f"{name} {x:g}" for name, x in values.items())


def search_blocks(searches: Sequence[Found], keys: Iterable[str], suffix: str = "") -> list[Block]:
    """Return the charts and the table of searches that are shown together.

    Args:
        searches: findings with `name` and the keys of `VariantSearch.tree`.
        keys: names of the searched keys.
        suffix: end of the names of charts and table.
    """
    charts = search_charts(f"search{suffix}", searches, keys)
    return [*keep_nonempty(*charts), settings_table(f"settings{suffix}", searches)]


def search_blocks_by_variant(section: SearchSection, searches: Sequence[Found]) -> list[Block]:
    """Return charts for each variant, with a curve for each place, and one table.

    Args:
        section: of the study.
        searches: findings as in `search_blocks`, with their `variant`.
    """
    charts = [
        chart
        for variant in dict.fromkeys(search["variant"] for search in searches)
        for chart in search_charts(
            f"search-{variant}",
            [search for search in searches if search["variant"] == variant],
            section.names(variant),
        )
    ]
    return [*keep_nonempty(*charts), settings_table("settings", searches)]


def settings_table(name: str, searches: Iterable[Found]) -> Table:
    """Return all settings that were tried, the best of every search first."""
    rows = []
    for variant in searches:
        order = sorted(variant["points"], key=_mean_or_infinite)
        for point in order:
            losses = [
                "diverged" if loss is None else f"{loss:.4f}" for loss in point["losses"].values()
            ]
            remark = ""
            if point["values"] == variant["best"]:
                remark = "best" if variant["tuned"] else f"best, at an edge: {_edges(variant)}"
            setting = format_setting(point["values"])
            rows.append((variant["name"], setting, ", ".join(losses), remark))
    head = ("variant", "setting", "validation loss by seed of the search", "remark")
    return Table(name=name, head=head, rows=tuple(rows))


def _edges(variant: Found) -> str:
    return ", ".join(variant["edges"])


def _mean_or_infinite(point: Found) -> float:
    return math.inf if point["mean"] is None else point["mean"]


def search_charts(name: str, searches: Sequence[Found], keys: Iterable[str]) -> list[Chart]:
    """Return, for every searched key, the loss along it through the best setting of each search."""
    charts = []
    for key in keys:
        series = []
        for variant in searches:
            best = variant["best"]
            if best is None or key not in best:
                continue
            points = [
                {"x": point["values"][key], "mean": point["mean"]}
                for point in variant["points"]
                if point["mean"] is not None and _only_differs_in(key, point["values"], best)
            ]
            points.sort(key=lambda point: point["x"])
            series.append(interval_series(variant["name"], points, "x", "mean", ends=None))
        charts.append(
            Chart(
                name=f"{name}-{key}",
                title=f"Loss by {key}",
                x_label=key,
                y_label=LOSS,
                log_x=True,
                series=tuple(series),
                caption="The other searched keys are at their best values. Mean over the seeds of "
                "the search; settings that diverged have no point.",
            )
        )
    return charts


def _only_differs_in(key: str, values: Found, best: Found) -> bool:
    return all(values[name] == x for name, x in best.items() if name != key)
