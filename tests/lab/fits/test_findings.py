"""From a table to what the fits to it say: groups, ratios, text, JSON and the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from muonscale.errors import ConfigError, StudyError
from muonscale.lab.fits.batch_table import AskedBatch, fit_batches
from muonscale.lab.fits.page import fit_page
from muonscale.lab.fits.scaling import Asked, fit_scaling
from muonscale.lab.fits.tables import RunTable
from muonscale.lab.fits.text import text
from muonscale.lab.report.page import Chart, Command, Table, Text, Verdict


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
    found = fit_scaling(ladder(), Asked(resamples=300))
    assert [fit.name for fit in found.fits] == ["muon", "adamw"]
    (ratio,) = found.ratios
    assert (ratio.first, ratio.second) == ("muon", "adamw")
    for row in ratio.rows:
        assert row.low < 0.5 < row.high and not row.extrapolated
    assert found.rung == "C" and len(found.fits[0].held_out) == 6
    assert found.fits[0].estimates[1].name == "b"
    assert found.fits[0].estimates[1].value == pytest.approx(0.052, rel=0.05)


def test_the_reference_and_the_column_can_be_named() -> None:
    found = fit_scaling(ladder(), Asked(resamples=100, reference="muon", by="optimizer"))
    assert (found.ratios[0].first, found.ratios[0].second) == ("adamw", "muon")
    with pytest.raises(StudyError, match="no group sgd"):
        fit_scaling(ladder(), Asked(reference="sgd"))
    with pytest.raises(StudyError, match="no column seed"):
        fit_scaling(ladder(), Asked(by="seed"))


def test_auto_takes_the_law_that_the_columns_allow() -> None:
    runs = grid()
    assert "alpha" in fit_scaling(table(**runs), Asked(resamples=100)).law
    ladder_of = {"C": 6 * runs["N"] * runs["D"], "loss": runs["loss"]}
    assert fit_scaling(table(**ladder_of), Asked(resamples=100)).law == "L = a * C^-b"
    compute = fit_scaling(table(**runs), Asked(law="compute", resamples=100))
    assert compute.fits[0].measured_x == pytest.approx(6 * runs["N"] * runs["D"])
    assert "6 x parameters x tokens" in compute.notes[0]
    with pytest.raises(ConfigError, match="did you mean chinchilla"):
        fit_scaling(table(**runs), Asked(law="chinchila"))


def test_the_best_allocation_says_where_it_is_extrapolated() -> None:
    found = fit_scaling(table(**grid()), Asked(resamples=100, at=(1e20, 1e24)))
    marks = {row.name: row.extrapolated for row in found.fits[0].estimates}
    assert marks["best N at C = 1e+20"] is False and marks["best loss at C = 1e+20"] is False
    assert marks["best N at C = 1e+24"] and marks["best D at C = 1e+24"]
    with pytest.raises(StudyError, match="at of point 1 is 0"):
        fit_scaling(table(**grid()), Asked(at=(0.0,)))


def test_groups_of_chinchilla_laws_are_compared_at_their_best() -> None:
    one, other = grid(noise=0), grid(noise=0)
    # With both terms 0.9 of what they were, a loss takes 0.9^(1/g) of the FLOPs.
    other["loss"] = 1.69 + 0.9 * (other["loss"] - 1.69)
    both = {name: [*one[name], *other[name]] for name in one}
    found = fit_scaling(table(**both, group=["adamw"] * 16 + ["muon"] * 16), Asked(resamples=100))
    exponent = 0.34 * 0.28 / (0.34 + 0.28)
    values = [row.value for row in found.ratios[0].rows]
    assert values == pytest.approx([0.9 ** (1 / exponent)] * 5, rel=1e-6)


def test_few_points_give_a_law_and_say_why_no_interval() -> None:
    runs = table(flops=[1e18, 1e19, 1e20], loss=[3, 2.6, 2.3])
    (fit,) = fit_scaling(runs, Asked()).fits
    assert "at least 4 points, got 3" in fit.without_intervals
    assert np.isnan(fit.estimates[0].low)
    assert all("3 different sizes" in item.refused for item in fit.held_out)
    shown = text(fit_scaling(runs, Asked()))
    assert "no intervals: an interval of a law" in shown and "nan" not in shown


def test_a_refusal_names_the_group() -> None:
    runs = table(rule=["muon"] * 3 + ["adamw"], flops=[1, 2, 3, 1], loss=[3, 2, 1, 3])
    with pytest.raises(StudyError, match=r"^adamw: .* at least 3 different sizes, got 1"):
        fit_scaling(runs, Asked())
    with pytest.raises(StudyError, match=r"^adamw: .*at least 3 different batch sizes"):
        fit_batches(table(rule=runs.columns["rule"], B=[1, 2, 3, 1], S=[3, 2, 1, 3]), AskedBatch())


def test_a_rung_column_says_what_is_left_out_together() -> None:
    runs = grid()
    rung = np.repeat([1, 2, 3, 4], 4)
    found = fit_scaling(table(**runs, rung=rung), Asked(resamples=100))
    assert found.rung == "rung"
    assert [item.rung for item in found.fits[0].held_out] == [1, 2, 3, 4]


def test_repeated_settings_give_seed_noise() -> None:
    flops = np.repeat(np.geomspace(1e18, 1e20, 4), 2)
    loss = 27 * flops**-0.05 * np.exp(np.tile([0.01, -0.01], 4))
    (fit,) = fit_scaling(table(flops=flops, loss=loss), Asked(resamples=100)).fits
    assert fit.seed_noise == pytest.approx(0.01 * np.sqrt(2))
    assert "seeds alone 1.41 %" in text(fit_scaling(table(flops=flops, loss=loss), Asked()))


def test_batch_laws_are_fitted_to_each_target_and_compared() -> None:
    found = fit_batches(steps(), AskedBatch(resamples=300))
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
    base = fit_batches(steps(), AskedBatch(resamples=100, base=65536)).fits[0].estimates[3]
    assert base.name.endswith("6.554e+04")
    assert base.value == pytest.approx(1.2 * 65536 + 0.2 * critical.value)


def test_tokens_stand_in_for_steps() -> None:
    batch = 2.0 ** np.arange(14, 20)
    by_steps = table(batch=batch, steps=900 + 9e7 / batch)
    by_tokens = table(batch=batch, tokens=900 * batch + 9e7)
    first, second = (fit_batches(runs, AskedBatch(resamples=100)) for runs in (by_steps, by_tokens))
    assert [row.value for row in second.fits[0].estimates] == pytest.approx(
        [row.value for row in first.fits[0].estimates]
    )
    assert any("tokens / batch" in note for note in second.notes)


def test_the_same_seed_gives_the_same_numbers_and_groups_other_draws() -> None:
    one, again = (fit_scaling(ladder(), Asked(resamples=100)).json() for _ in range(2))
    assert one == again
    assert one != fit_scaling(ladder(), Asked(resamples=100, seed=1)).json()
    # Two groups with the same losses: were they drawn alike, their ratio would have no width.
    flops, loss = np.geomspace(1e18, 1e20, 6), [3.1, 2.9, 2.7, 2.5, 2.4, 2.2]
    same = table(rule=["a"] * 6 + ["b"] * 6, flops=[*flops, *flops], loss=loss * 2)
    row = fit_scaling(same, Asked(resamples=100)).ratios[0].rows[2]
    assert row.value == pytest.approx(1) and row.low < 0.99 and row.high > 1.01


def test_json_has_every_number_and_null_for_none() -> None:
    tree = json.loads(fit_scaling(ladder(), Asked(resamples=100)).json())
    assert tree["fits"][0]["status"] == "converged"
    assert tree["ratios"][0]["rows"][0]["low"] < 0.5
    few = fit_scaling(table(flops=[1e18, 1e19, 1e20], loss=[3, 2.6, 2.3]), Asked())
    tree = json.loads(few.json(), parse_constant=lambda name: pytest.fail(name))
    assert tree["fits"][0]["estimates"][0]["low"] is None


def test_text_shows_marks_and_remarks() -> None:
    shown = text(fit_scaling(table(**grid(E=0, noise=0)), Asked(resamples=100)))
    assert "bound hit" in shown and "these runs do not tell it" in shown
    lines = [line for line in shown.splitlines() if "best N" in line]
    assert lines[-1].endswith("extrapolated")


def test_the_page_has_charts_tables_verdicts_and_the_command() -> None:
    page = fit_page(fit_scaling(ladder(), Asked(resamples=200)), "muonscale fit scaling runs.csv")
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
    ("factor", "passed", "said"), [(1.0, None, "not told apart"), (2.0, True, "above 1")]
)
def test_the_verdict_follows_the_interval(factor: float, passed: bool | None, said: str) -> None:
    page = fit_page(fit_scaling(ladder(0.002, factor), Asked(resamples=200)))
    blocks = [block for section in page.sections for block in section.blocks]
    (verdict,) = [block for block in blocks if isinstance(block, Verdict)]
    assert verdict.passed is passed and said in verdict.text


def test_a_page_without_intervals_has_no_bands() -> None:
    page = fit_page(fit_scaling(table(flops=[1e18, 1e19, 1e20], loss=[3, 2.6, 2.3]), Asked()))
    blocks = [block for section in page.sections for block in section.blocks]
    (chart,) = [block for block in blocks if isinstance(block, Chart)]
    assert chart.series[1].low is None
    assert any(isinstance(block, Text) and "no intervals" in block.text for block in blocks)


def test_a_page_of_batches_has_a_chart_of_steps() -> None:
    page = fit_page(fit_batches(steps(), AskedBatch(resamples=100)))
    charts = [b for section in page.sections for b in section.blocks if isinstance(b, Chart)]
    assert charts[0].x_label == "batch size" and len(charts[0].series) == 8 and len(charts) == 3
