from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from muonscale.lab.report import matplotlib_charts
from muonscale.lab.report.axes import axis_of, drawable, minimum_of, number_text, tick_texts
from muonscale.lab.report.page import Chart, Mark, Series, Surface
from muonscale.lab.report.palette import (
    ADAMW,
    FAINT,
    MUON,
    PALEST,
    SERIES,
    dark_colors,
    opacities,
    styles,
)
from muonscale.lab.report.plotly_charts import figure_json
from tests.lab.report.sample import BAND_CHART, CHARTS, LOG_CHART, NAN, PAGE, SURFACE_CHART

STYLES = styles(PAGE.charts)


def plotly(chart: Chart) -> dict[str, Any]:
    return json.loads(figure_json(chart, STYLES))


def chart_of(*series: Series, **options: Any) -> Chart:
    return Chart(name="c", title="t", x_label="x", y_label="y", series=series, **options)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.005, "0.005"), (0.02, "0.02"), (1, "1"), (2000, "2000"), (16384, "16.38k"), (1e6, "1M"),
     (2.5e9, "2.5B"), (1e12, "1T"), (6.8e18, "6.8e+18"), (0, "0"), (-20_000, "-20k"), (2e-05, "2e-05")],
)  # fmt: skip
def test_numbers_of_axes_are_short(value: float, text: str) -> None:
    assert number_text(value) == text


def test_ticks_have_the_digits_that_tell_them_apart() -> None:
    assert tick_texts((16384, 32768, 65536)) == ["16.4k", "32.8k", "65.5k"]
    assert tick_texts((100_100, 100_200)) == ["100.1k", "100.2k"]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.003, 0.007, 0.012), (0.003, 0.007, 0.012)),  # a sweep: its own values
        (tuple(np.geomspace(1, 10, 30)), (1, 2, 5, 10)),
        (tuple(np.geomspace(1, 100, 30)), (1, 3, 10, 30, 100)),
        (tuple(np.geomspace(1, 1e4, 30)), (1, 10, 100, 1000, 1e4)),
        (tuple(np.geomspace(1, 1e20, 30)), (1, 1e3, 1e6, 1e9, 1e12, 1e15, 1e18)),
        (tuple(np.geomspace(4.1, 4.9, 30)), (4.2, 4.4, 4.6, 4.8)),  # within one power of ten
    ],
)
def test_logarithmic_axes_have_round_ticks(values: tuple[float, ...], ticks: object) -> None:
    axis = axis_of(chart_of(Series(name="a", x=values, y=(1.0,) * len(values)), log_x=True), "x")
    assert axis is not None and axis.ticks == pytest.approx(ticks)
    assert axis.low < min(values) and max(values) < axis.high


def test_an_axis_shows_intervals_and_marks_but_no_x_without_y() -> None:
    series = Series(
        name="a", x=(1.0, 2.0, 900.0), y=(5.0, 6.0, NAN), low=(1.0, 6.0, NAN), high=(5.0, 9.0, NAN)
    )
    chart = chart_of(series, marks=(Mark(axis="y", at=20.0, label="m"),))
    x, y = axis_of(chart, "x"), axis_of(chart, "y")
    assert x is not None and x.high < 3
    assert y is not None and y.low < 1 and y.high > 20
    limited = axis_of(replace(chart, y_limits=(4.0, 7.0)), "y")
    assert limited is not None and (limited.low, limited.high) == (4.0, 7.0)


def test_what_a_logarithmic_axis_cannot_show_is_left_out_with_a_sentence() -> None:
    chart, note = drawable(LOG_CHART)
    assert note.startswith("2 values are left out")
    (series,) = chart.series
    assert math.isnan(series.x[0]) and series.x[1:] == LOG_CHART.series[0].x[1:]
    assert series.low == (1e6, 5e5, 1.9e6)  # the one of -1 ends at half of the least value
    assert chart.marks == ()
    assert drawable(BAND_CHART)[1] == ""


def test_infinities_are_gaps() -> None:
    (series,) = drawable(chart_of(Series(name="a", x=(1.0, 2.0), y=(math.inf, 3.0))))[0].series
    assert math.isnan(series.y[0]) and series.y[1] == 3.0


def test_a_surface_loses_what_a_logarithmic_axis_cannot_show() -> None:
    surface = Surface(
        x=(0.0, 1.0, 2.0), y=(1.0, 2.0), z=((9.0, 1.0, 2.0), (9.0, 3.0, 0.5)), label="z"
    )
    chart, note = drawable(replace(SURFACE_CHART, surface=surface, series=()))
    assert chart.surface is not None and chart.surface.z == ((1.0, 2.0), (3.0, 0.5))
    assert "1 value is left out" in note
    assert minimum_of(chart.surface) == (2.0, 2.0, 0.5)


def test_groups_that_meet_differ_and_keep_their_colors() -> None:
    names = ["run-muon", "run-adamw", "c", "d"]
    series = {n: Series(name=n, x=(1.0,), y=(1.0,)) for n in names}
    other = Series(name="Muon fit", group="run-muon", x=(1.0,), y=(1.0,))
    found = styles([chart_of(series["c"], series["d"]), chart_of(*series.values(), other)])
    assert found["run-muon"].color == MUON and found["run-adamw"].color == ADAMW
    assert len({style.color for style in found.values()}) == 4
    many = [Series(name=str(n), x=(1.0,), y=(1.0,)) for n in range(20)]
    assert len(set(styles([chart_of(*many)]).values())) == 20


def test_groups_that_never_meet_share_the_first_colors() -> None:
    one, two = (chart_of(Series(name=n, x=(1.0,), y=(1.0,))) for n in "ab")
    found = styles([one, two])
    assert found["a"] == found["b"] and found["a"].color == next(iter(SERIES))


def test_every_color_of_a_figure_has_one_for_the_dark_page() -> None:
    def colors(node: Any, of_color: bool = False) -> set[str]:
        if isinstance(node, dict):
            pairs = node.items()
            return {
                c for key, v in pairs for c in colors(v, "color" in key and key != "colorscale")
            }
        if isinstance(node, list):
            return {c for item in node for c in colors(item, of_color)}
        return {node} if of_color and isinstance(node, str) else set()

    used = set().union(*(colors(plotly(chart)) for chart in CHARTS))
    # The star and the dots lie on contours, which are the same on both pages.
    assert used - dark_colors().keys() == {"white", "black"}


def test_bands_are_split_at_gaps() -> None:
    band = next(trace for trace in plotly(BAND_CHART)["data"] if trace.get("fill") == "toself")
    assert band["x"] == [0, 1e6, 1e6, 0, None, 3e6, 4e6, 4e6, 3e6, None]
    assert band["y"] == [6.5, 4.5, 5.5, 7.5, None, 3.5, 3.0, 4.0, 4.5, None]


def test_points_have_error_bars_and_dashed_lines_dashes() -> None:
    (points,) = plotly(LOG_CHART)["data"]
    assert points["mode"] == "markers"
    assert points["error_y"]["array"] == [0, 5e5, pytest.approx(1e5)]
    assert points["error_y"]["arrayminus"] == [0, 1e6, pytest.approx(1e5)]
    traces = {t.get("name"): t for t in plotly(BAND_CHART)["data"]}
    assert traces["fit"]["line"]["dash"] == "dash"
    assert traces["Muon, training"]["line"]["color"] == traces["fit"]["line"]["color"] == MUON


def test_a_surface_has_its_smallest_value_starred() -> None:
    contour, _, star, path = plotly(SURFACE_CHART)["data"]
    assert contour["type"] == "contour" and contour["z"] == [[3.4, 3.2, 3.3], [3.3, 3.1, None]]
    assert (star["x"], star["y"], star["marker"]["symbol"]) == ([0.01], [0.1], "star")
    assert path["name"] == "path"


def test_matplotlib_draws_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = matplotlib_charts._figure(BAND_CHART, STYLES)
    (axes,) = figure.axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    for series in BAND_CHART.series:
        np.testing.assert_array_equal(lines[series.name].get_xdata(), series.x)
        np.testing.assert_array_equal(lines[series.name].get_ydata(), series.y)
    assert lines["fit"].get_linestyle() == "--" and lines["validation"].get_linestyle() == "None"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Muon, training", "fit", "validation",
    ]  # fmt: skip


def test_matplotlib_says_what_is_left_out_and_where_nothing_is() -> None:
    label = matplotlib_charts._figure(LOG_CHART, STYLES).axes[0].get_xlabel()
    assert "2 values are left out" in label
    empty = matplotlib_charts._figure(CHARTS[-1], STYLES).axes[0]
    assert [text.get_text() for text in empty.texts] == ["no values"]
    surface = matplotlib_charts._figure(SURFACE_CHART, STYLES).axes[0]
    assert "star: least loss (nats), 3.1 at (0.01, 0.1)" in surface.get_xlabel()
    assert [t.get_text() for t in surface.get_xticklabels()] == ["0.005", "0.01", "0.02"]


BARS = chart_of(
    Series(name="a", x=(0.0, 1.0), y=(1.0, 2.0)),
    Series(name="b", x=(0.0, 1.0), y=(3.0, 4.0)),
    marks=(Mark(axis="y", at=7.0, label="limit"),),
    bars=("first", "second"),
)


def test_bars_are_stacked_by_both_renderers() -> None:
    looks = styles([BARS])
    y = axis_of(BARS, "y")
    assert y is not None and y.low == 0 and y.high > 7
    axes = matplotlib_charts._figure(BARS, looks).axes[0]
    boxes = [(patch.get_y(), patch.get_height()) for patch in axes.patches]
    assert boxes == [(0, 1), (0, 2), (1, 3), (2, 4)]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["first", "second"]
    tree = json.loads(figure_json(BARS, looks))
    assert [trace["type"] for trace in tree["data"]] == ["bar", "bar"]
    assert tree["layout"]["barmode"] == "stack"
    assert tree["layout"]["xaxis"]["ticktext"] == ["first", "second"]


def test_panels_share_y_limits_and_one_legend(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(matplotlib_charts, "_save", lambda figure: figures.append(figure) or {})
    one, two = (
        chart_of(
            Series(name=name, group="g", x=(1.0, 2.0), y=y), Series(name="h", x=(1.0,), y=(1.0,))
        )
        for name, y in (("a", (0.0, 1.0)), ("b", (5.0, 9.0)))
    )
    matplotlib_charts.draw_panels([[one, two]], "title")
    left, right = figures[0].axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[1] > 9
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["g", "h"]
    matplotlib_charts.draw_panels([[BARS, chart_of(Series(name="c", x=(1.0,), y=(1.0,)))]], "title")
    assert not figures[1].legends and all(axes.get_legend() for axes in figures[1].axes)


def test_a_legend_can_name_groups_once_in_both_renderers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def series(name: str, group: str, **options: Any) -> Series:
        return Series(name=name, group=group, x=(1.0, 2.0), y=(1.0, 2.0), **options)

    chart = chart_of(
        series("q", "attention", low=(0.5, 1.5), high=(1.5, 2.5)),
        series("k", "attention"),
        series("width^1", "reference", kind="dashed"),
        legend="groups",
    )
    looks = styles([chart])
    lines = [t for t in json.loads(figure_json(chart, looks))["data"] if "fill" not in t]
    named = [(t["name"], t["legendgroup"]) for t in lines if t["showlegend"] is not False]
    assert named == [("attention", "attention"), ("reference", "reference")]
    assert [t["hovertemplate"].split("</b>")[0] for t in lines] == ["<b>q", "<b>k", "<b>width^1"]
    figures: list[Any] = []
    monkeypatch.setattr(matplotlib_charts, "_save", figures.append)
    matplotlib_charts.draw(chart, looks)
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["attention", "reference"]
    assert [line.get_linestyle() for line in legend.get_lines()] == ["-", "--"]


def test_lines_of_one_color_differ_in_shade() -> None:
    def line(name: str, group: str, **options: Any) -> Series:
        return Series(name=name, group=group, x=(1.0, 2.0), y=(1.0, 2.0), **options)

    chart = chart_of(
        line("muon, 4.6", "muon"),
        line("steps", "muon", kind="faint"),
        line("muon, 4.4", "muon"),
        line("muon, 4.2", "muon"),
        line("fit", "muon", kind="dashed"),
    )
    assert opacities(chart) == pytest.approx([1.0, FAINT, (1 + PALEST) / 2, PALEST, 1.0])
    looks = styles([chart])
    drawn = [t["opacity"] for t in json.loads(figure_json(chart, looks))["data"]]
    assert drawn == pytest.approx(opacities(chart))
    axes = matplotlib_charts._figure(chart, looks).axes[0]
    assert [line.get_alpha() for line in axes.get_lines()] == pytest.approx(opacities(chart))


def test_no_other_group_looks_like_muon_or_adamw() -> None:
    lines = [Series(name=name, x=(1.0,), y=(1.0,)) for name in ("4.6", "4.4", "muon")]
    looks = styles([chart_of(*lines[:2]), chart_of(lines[2])])
    assert looks["muon"].color == MUON
    assert not {looks["4.6"].color, looks["4.4"].color} & {MUON, ADAMW}


def test_one_box_shows_all_lines_at_an_x() -> None:
    line = Series(name="a", x=(1.0, 2.0), y=(1.0, 2.0))
    points = replace(line, name="b", kind="points")
    for series, mode in (((line,), "x unified"), ((line, points), "closest")):
        chart = chart_of(*series)
        tree = json.loads(figure_json(chart, styles([chart])))
        assert tree["layout"]["hovermode"] == mode


def test_axes_name_their_scale_and_count_flops_in_giga() -> None:
    chart = replace(
        chart_of(Series(name="a", x=(1e9, 1e10, 1e11), y=(1.0, 2.0, 3.0)), log_x=True),
        x_label="training FLOPs",
    )
    looks = styles([chart])
    axis = json.loads(figure_json(chart, looks))["layout"]["xaxis"]
    assert axis["ticktext"] == ["1G", "10G", "100G"]
    assert axis["title"]["text"] == "training FLOPs, log scale"
    axes = matplotlib_charts._figure(chart, looks).axes[0]
    assert axes.get_xlabel() == "training FLOPs, log scale"
    assert [text.get_text() for text in axes.get_xticklabels()] == axis["ticktext"]
