"""From a table to what the fits to it say: groups, ratios, text, JSON and the page."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from muonscale.errors import ConfigError, StudyError
from muonscale.lab.fits.fit_table import FitRequest, fit_table
from muonscale.lab.fits.laws.registry import LAWS
from muonscale.lab.fits.page import fit_page
from muonscale.lab.fits.tables import RunTable
from muonscale.lab.fits.text import format_findings
from muonscale.lab.report.page import Chart, Command, Table, Text, Verdict

STEPS = partial(FitRequest, measured="steps")


def table(**columns: object) -> RunTable:
    cells = {name: tuple(map(str, values)) for name, values in columns.items()}
    rows = len(next(iter(cells.values())))
    return RunTable(Path("runs.csv"), cells, tuple(range(2, rows + 2)))


def ladder(noise: float = 0.001, factor: float = 0.5) -> RunTable:
    """Muon needs `factor` of the FLOPs of AdamW to each loss."""
    flops = np.geomspace(1e18, 3e20, 6)
    rng = np.random.default_rng(0)
    adamw = 27 * flops**-0.052 * np.exp(noise * rng.standard_normal(6))
    muon = 27 * (flops / factor) ** -0.052 * np.exp(noise * rng.standard_normal(6))
    names = ["muon"] * 6 + ["adamw"] * 6
    return table(optimizer=names, C=[*flops, *flops], loss=[*muon, *adamw])


def grid(E: float = 1.69, noise: float = 0.003) -> dict[str, np.ndarray]:
    n, d = map(np.ravel, np.meshgrid(np.geomspace(4e7, 4e9, 4), np.geomspace(1e9, 1e11, 4)))
    rng = np.random.default_rng(1)
    loss = (E + 406.4 / n**0.34 + 410.7 / d**0.28) * np.exp(noise * rng.standard_normal(16))
    return {"N": n, "D": d, "loss": loss}


def steps() -> RunTable:
    batch = 2.0 ** np.arange(14, 20)
    rng = np.random.default_rng(2)
    rows = [
        (rule, size, target, (smin + emin / size) * np.exp(0.01 * rng.standard_normal()))
        for rule, smin, emin in (("muon", 900, 9e7), ("adamw", 1500, 1e8))
        for target in ("3.2", "3.0")
        for size in batch
    ]
    rule, size, target, count = zip(*rows, strict=True)
    return table(rule=rule, batch=size, target_loss=target, steps=count)


def test_optimizers_are_compared_by_flops_at_equal_loss() -> None:
    found = fit_table(ladder(), FitRequest(resamples=300))
    assert [fit.name for fit in found.fits] == ["muon", "adamw"]
    (ratio,) = found.ratios
    assert (ratio.first, ratio.second) == ("muon", "adamw")
    for row in ratio.rows:
        assert row.low < 0.5 < row.high and not row.extrapolated
    assert found.rung == "C" and len(found.fits[0].left_out) == 6
    assert found.fits[0].estimates[1].name == "b"
    assert found.fits[0].estimates[1].value == pytest.approx(0.052, rel=0.05)


def test_the_reference_and_the_column_can_be_named() -> None:
    found = fit_table(ladder(), FitRequest(resamples=100, reference="muon", by="optimizer"))
    assert (found.ratios[0].first, found.ratios[0].second) == ("adamw", "muon")
    with pytest.raises(StudyError, match="no group sgd"):
        fit_table(ladder(), FitRequest(reference="sgd"))
    with pytest.raises(StudyError, match="no column seed"):
        fit_table(ladder(), FitRequest(by="seed"))


def test_auto_takes_the_law_that_the_columns_allow() -> None:
    runs = grid()
    assert "alpha" in fit_table(table(**runs), FitRequest(resamples=100)).law
    ladder_of = {"C": 6 * runs["N"] * runs["D"], "loss": runs["loss"]}
    assert fit_table(table(**ladder_of), FitRequest(resamples=100)).law == "L = a * C^-b"
    compute = fit_table(table(**runs), FitRequest(law="compute", resamples=100))
    assert compute.fits[0].measured_x == pytest.approx(6 * runs["N"] * runs["D"])
    assert "6 x parameters x tokens" in compute.notes[0]
    with pytest.raises(ConfigError, match="did you mean chinchilla"):
        fit_table(table(**runs), FitRequest(law="chinchila"))


def test_the_best_allocation_says_where_it_is_extrapolated() -> None:
    found = fit_table(table(**grid()), FitRequest(resamples=100, at=(1e20, 1e24)))
    marks = {row.name: row.extrapolated for row in found.fits[0].estimates}
    assert marks["best N at C = 1e+20"] is False and marks["best loss at C = 1e+20"] is False
    assert marks["best N at C = 1e+24"] and marks["best D at C = 1e+24"]
    with pytest.raises(StudyError, match="FLOPs 0"):
        fit_table(table(**grid()), FitRequest(at=(0.0,)))


def test_groups_of_chinchilla_laws_are_compared_at_their_best() -> None:
    one, other = grid(noise=0), grid(noise=0)
    # With both terms 0.9 of what they were, a loss takes 0.9^(1/g) of the FLOPs.
    other["loss"] = 1.69 + 0.9 * (other["loss"] - 1.69)
    both = {name: [*one[name], *other[name]] for name in one}
    found = fit_table(
        table(**both, group=["adamw"] * 16 + ["muon"] * 16), FitRequest(resamples=100)
    )
    exponent = 0.34 * 0.28 / (0.34 + 0.28)
    values = [row.value for row in found.ratios[0].rows]
    assert values == pytest.approx([0.9 ** (1 / exponent)] * 5, rel=1e-6)


def test_few_points_give_a_law_and_say_why_no_interval() -> None:
    runs = table(flops=[1e18, 1e19, 1e20], loss=[3, 2.6, 2.3])
    (fit,) = fit_table(runs, FitRequest()).fits
    assert "at least 4 points, got 3" in fit.without_intervals
    assert np.isnan(fit.estimates[0].low)
    assert all("3 different sizes" in item.refused for item in fit.left_out)
    shown = format_findings(fit_table(runs, FitRequest()))
    assert "no intervals: an interval of a law" in shown and "nan" not in shown


def test_a_refusal_names_the_group() -> None:
    runs = table(rule=["muon"] * 3 + ["adamw"], flops=[1, 2, 3, 1], loss=[3, 2, 1, 3])
    with pytest.raises(StudyError, match=r"^adamw: .* at least 3 different sizes, got 1"):
        fit_table(runs, FitRequest())
    with pytest.raises(StudyError, match=r"^adamw: .*at least 3 different batch sizes"):
        fit_table(table(rule=runs.columns["rule"], B=[1, 2, 3, 1], S=[3, 2, 1, 3]), STEPS())


def test_a_rung_column_says_what_is_left_out_together() -> None:
    runs = grid()
    rung = np.repeat([1, 2, 3, 4], 4)
    found = fit_table(table(**runs, rung=rung), FitRequest(resamples=100))
    assert found.rung == "rung"
    assert [item.rung for item in found.fits[0].left_out] == [1, 2, 3, 4]


def test_repeated_settings_give_seed_noise() -> None:
    flops = np.repeat(np.geomspace(1e18, 1e20, 4), 2)
    loss = 27 * flops**-0.05 * np.exp(np.tile([0.01, -0.01], 4))
    (fit,) = fit_table(table(flops=flops, loss=loss), FitRequest(resamples=100)).fits
    assert fit.seed_noise == pytest.approx(0.01 * np.sqrt(2))
    assert "seeds alone 1.41 %" in format_findings(
        fit_table(table(flops=flops, loss=loss), FitRequest())
    )


def test_batch_laws_are_fitted_to_each_target_and_compared() -> None:
    found = fit_table(steps(), STEPS(resamples=300))
    assert [fit.name for fit in found.fits] == [
        "muon to 3.2",
        "muon to 3.0",
        "adamw to 3.2",
        "adamw to 3.0",
    ]
    assert [(ratio.first, ratio.second) for ratio in found.ratios] == [
        ("adamw to 3.2", "muon to 3.2"),
        ("adamw to 3.0", "muon to 3.0"),
    ]
    for ratio in found.ratios:
        for size, row in zip(ratio.places, ratio.rows, strict=True):
            assert row.value == pytest.approx((1500 + 1e8 / size) / (900 + 9e7 / size), rel=0.02)
            assert row.low < row.value < row.high
    critical = found.fits[0].estimates[2]
    assert critical.low < 1e5 < critical.high and not critical.extrapolated
    base = fit_table(steps(), STEPS(resamples=100, at=(65536,))).fits[0].estimates[3]
    assert base.name.endswith("6.554e+04")
    assert base.value == pytest.approx(1.2 * 65536 + 0.2 * critical.value)


def test_tokens_stand_in_for_steps() -> None:
    batch = 2.0 ** np.arange(14, 20)
    by_steps = table(batch=batch, steps=900 + 9e7 / batch)
    by_tokens = table(batch=batch, tokens=900 * batch + 9e7)
    first, second = (fit_table(runs, STEPS(resamples=100)) for runs in (by_steps, by_tokens))
    assert [row.value for row in second.fits[0].estimates] == pytest.approx(
        [row.value for row in first.fits[0].estimates]
    )
    assert any("tokens / batch" in note for note in second.notes)


def test_the_same_seed_gives_the_same_numbers_and_groups_other_draws() -> None:
    one, again = (fit_table(ladder(), FitRequest(resamples=100)).json() for _ in range(2))
    assert one == again
    assert one != fit_table(ladder(), FitRequest(resamples=100, seed=1)).json()
    # Two groups with the same losses: were they drawn alike, their ratio would have no width.
    flops, loss = np.geomspace(1e18, 1e20, 6), [3.1, 2.9, 2.7, 2.5, 2.4, 2.2]
    same = table(rule=["a"] * 6 + ["b"] * 6, flops=[*flops, *flops], loss=loss * 2)
    row = fit_table(same, FitRequest(resamples=100)).ratios[0].rows[2]
    assert row.value == pytest.approx(1) and row.low < 0.99 and row.high > 1.01


def test_json_has_every_number_and_null_for_none() -> None:
    tree = json.loads(fit_table(ladder(), FitRequest(resamples=100)).json())
    assert tree["fits"][0]["status"] == "converged"
    assert tree["ratios"][0]["rows"][0]["low"] < 0.5
    few = fit_table(table(flops=[1e18, 1e19, 1e20], loss=[3, 2.6, 2.3]), FitRequest())
    tree = json.loads(few.json(), parse_constant=lambda name: pytest.fail(name))
    assert tree["fits"][0]["estimates"][0]["low"] is None


def test_text_shows_marks_and_remarks() -> None:
    shown = format_findings(fit_table(table(**grid(E=0, noise=0)), FitRequest(resamples=100)))
    assert "bound hit" in shown and "do not determine it" in shown
    lines = [line for line in shown.splitlines() if "best N" in line]
    assert lines[-1].endswith("extrapolated")


def jittered() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return 240 runs whose sizes differ in the fourth digit, as in a digitized figure, and the N."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(4e7, 1.6e10, 16)
    n, d = map(np.ravel, np.meshgrid(sizes, np.geomspace(1e9, 4e11, 15)))
    n = n * (1 + 1e-3 * rng.uniform(-1, 1, 240))
    d = d * (1 + 1e-3 * rng.uniform(-1, 1, 240))
    # The law of the replication of Chinchilla (arXiv 2404.10102).
    loss = 1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658
    return {"N": n, "D": d, "loss": loss * np.exp(0.005 * rng.standard_normal(240))}, sizes


def test_many_close_sizes_are_a_few_rungs_and_the_console_summarizes_them() -> None:
    runs, sizes = jittered()
    found = fit_table(table(**runs), FitRequest(resamples=100))
    left_out = found.fits[0].left_out
    assert [item.rung for item in left_out] == pytest.approx(sizes.tolist(), rel=1e-3)
    assert {item.points for item in left_out} == {15}
    assert [item.extrapolated for item in left_out] == [True, *[False] * 14, True]

    shown = format_findings(found).splitlines()
    errors = [item.error for item in left_out if item.error is not None]
    lines = [line for line in shown if "error without N =" in line]
    worst = [f"{100 * error:.3g} %" for error in sorted(errors)[-5:]]
    assert len(lines) in (5, 6) and all(any(end in line for line in lines) for end in worst)
    assert "1.6e+10" in lines[-1] and lines[-1].endswith("extrapolated")
    (median,) = [line for line in shown if "median of 16" in line]
    assert f"{100 * np.median(errors):.3g} %" in median
    assert len(shown) < 25

    assert len(json.loads(found.json())["fits"][0]["left_out"]) == 16
    blocks = [block for section in fit_page(found).sections for block in section.blocks]
    tables = [block for block in blocks if isinstance(block, Table)]
    assert [len(block.rows) for block in tables if block.name == "left-out-1"] == [16]


@pytest.mark.parametrize("law", [name for name in LAWS if LAWS[name].MEASURED == "loss"])
def test_every_law_of_the_loss_fits_a_table_and_compares_groups(law: str) -> None:
    one, other = grid(noise=0), grid(noise=0)
    other["loss"] = 0.98 * other["loss"]
    both = {name: [*one[name], *other[name]] for name in one}
    runs = table(**both, group=["adamw"] * 16 + ["muon"] * 16)
    found = fit_table(runs, FitRequest(law=law, resamples=100))
    assert found.law == LAWS[law].FORMULA
    assert all(fit.estimates and fit.left_out and fit.curve for fit in found.fits)
    (ratio,) = found.ratios
    assert all(0 < row.value < 1 for row in ratio.rows)


@pytest.mark.parametrize("law", [name for name in LAWS if LAWS[name].MEASURED == "steps"])
def test_every_law_of_the_steps_fits_a_table_and_compares_groups(law: str) -> None:
    found = fit_table(steps(), STEPS(law=law, resamples=100))
    assert found.law == LAWS[law].FORMULA
    assert all(fit.estimates and fit.left_out and fit.curve for fit in found.fits)
    assert all(row.value > 1 for ratio in found.ratios for row in ratio.rows)
    critical = next(row for row in found.fits[0].estimates if row.name.startswith(("B*", "crit")))
    assert 16384 < critical.value < 524288


def test_more_places_add_to_the_measured_ones_and_the_charts_reach_them() -> None:
    """What is asked for must not hide the verdict on what was measured."""
    plain = fit_table(ladder(), FitRequest(resamples=200))
    asked = fit_table(ladder(), FitRequest(resamples=200, at=(1e21, 1e17)))
    names = [{row.name for row in found.fits[0].estimates} for found in (plain, asked)]
    assert names[1] - names[0] == {"loss at C = 1e+21", "loss at C = 1e+17"} and names[0] < names[1]
    (before,), (after,) = plain.ratios, asked.ratios
    known = dict(zip(before.places, before.rows, strict=True))
    found = dict(zip(after.places, after.rows, strict=True))
    assert known.items() <= found.items() and found.keys() - known.keys() == {1e17, 1e21}
    assert found[1e17].extrapolated and found[1e21].extrapolated

    blocks = [block for section in fit_page(asked).sections for block in section.blocks]
    verdicts = [block for block in blocks if isinstance(block, Verdict)]
    assert [verdict.passed for verdict in verdicts] == [True]
    law, ratio = (block for block in blocks if isinstance(block, Chart))
    dashed = [series for series in law.series if series.kind == "dashed"]
    assert len(dashed) == 4  # two groups, on both sides of their runs
    assert max(max(s.x) for s in dashed) == pytest.approx(1e21)
    assert min(min(s.x) for s in dashed) == pytest.approx(1e17)
    for series in law.series:
        if series.kind == "line":
            assert (min(series.x), max(series.x)) == pytest.approx((1e18, 3e20))
    assert (min(ratio.series[0].x), max(ratio.series[0].x)) == (1e17, 1e21)


def test_a_law_that_its_runs_do_not_determine_is_not_drawn_and_not_compared() -> None:
    """Its lowest loss for each C was a nat below all of its runs."""
    bad, good = grid(E=1e-9, noise=0.03), grid(noise=0)
    both = {name: [*bad[name], *good[name]] for name in bad}
    found = fit_table(
        table(**both, group=["adamw"] * 16 + ["muon"] * 16), FitRequest(resamples=100)
    )
    assert [str(fit.status) for fit in found.fits] == ["bound hit", "converged"]
    assert found.fits[0].curve is None and found.fits[1].curve is not None
    assert found.ratios[0].undetermined == ("adamw",)

    blocks = [block for section in fit_page(found).sections for block in section.blocks]
    (chart,) = [block for block in blocks if isinstance(block, Chart)]
    assert [series.name for series in chart.series] == [
        "adamw, measured", "muon, measured", "muon, law",
    ]  # fmt: skip
    assert "law of adamw" in chart.caption
    (verdict,) = [block for block in blocks if isinstance(block, Verdict)]
    assert verdict.passed is None and "adamw" in verdict.text
    assert "law of adamw" in format_findings(found)


def test_the_page_has_charts_tables_verdicts_and_the_command() -> None:
    page = fit_page(
        fit_table(ladder(), FitRequest(resamples=200)), "muonscale fit scaling runs.csv"
    )
    blocks = [block for section in page.sections for block in section.blocks]
    charts = [block for block in blocks if isinstance(block, Chart)]
    assert [chart.name for chart in charts] == ["fit", "ratio-1"]
    measured, law = charts[0].series[:2]
    assert measured.kind == "points" and len(measured.x) == 6 and measured.group == "muon"
    assert law.low is not None and all(low < y for low, y in zip(law.low, law.y, strict=True))
    names = [block.name for block in blocks if isinstance(block, (Chart, Table))]
    assert len(set(names)) == len(names)
    (verdict,) = [block for block in blocks if isinstance(block, Verdict)]
    assert verdict.passed is True and "below 1" in verdict.text
    assert Command("muonscale fit scaling runs.csv") in blocks
    assert page.summary.startswith("L = a * C^-b, fitted to runs.csv")


@pytest.mark.parametrize(
    ("factor", "passed", "said"),
    [(1.0, None, "not significantly different"), (2.0, True, "above 1")],
)
def test_the_verdict_follows_the_interval(factor: float, passed: bool | None, said: str) -> None:
    page = fit_page(fit_table(ladder(0.002, factor), FitRequest(resamples=200)))
    blocks = [block for section in page.sections for block in section.blocks]
    (verdict,) = [block for block in blocks if isinstance(block, Verdict)]
    assert verdict.passed is passed and said in verdict.text


def test_a_page_without_intervals_has_no_bands() -> None:
    page = fit_page(fit_table(table(flops=[1e18, 1e19, 1e20], loss=[3, 2.6, 2.3]), FitRequest()))
    blocks = [block for section in page.sections for block in section.blocks]
    (chart,) = [block for block in blocks if isinstance(block, Chart)]
    assert chart.series[1].low is None
    assert any(isinstance(block, Text) and "no intervals" in block.text for block in blocks)


def test_a_page_of_batches_has_a_chart_of_steps() -> None:
    page = fit_page(fit_table(steps(), STEPS(resamples=100)))
    charts = [b for section in page.sections for b in section.blocks if isinstance(b, Chart)]
    assert charts[0].x_label == "batch size" and len(charts[0].series) == 8 and len(charts) == 3
