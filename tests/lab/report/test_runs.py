from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest

from muonscale.lab.config.load import load_config
from muonscale.lab.report.check import check_page
from muonscale.lab.report.page import (
    Chart,
    ChartViews,
    Command,
    Page,
    PageSection,
    Series,
    Table,
    Text,
    Tiles,
    Verbatim,
)
from muonscale.lab.report.run_tables import reproduce_command
from muonscale.lab.report.runs import runs_page
from tests.lab.report.folders import (
    ENV,
    RESULT,
    evaluation,
    heard,
    records,
    routed,
    telemetry,
    training,
    write_run,
)


def section(page: Page, title: str) -> PageSection:
    return next(section for section in page.sections if section.title == title)


def texts(page: Page, title: str) -> list[str]:
    blocks = section(page, title).blocks
    return [b.text for b in blocks if isinstance(b, Text | Command | Verbatim)]


def lines_of(chart: Chart) -> list[Series]:
    return [series for series in chart.series if series.kind != "faint"]


def charts(page: Page) -> dict[str, Chart]:
    check_page(page)
    return {chart.name: chart for chart in page.charts}


def table(page: Page, name: str) -> Table:
    return next(table for table in page.tables if table.name == name)


def cells(page: Page, name: str) -> dict[str, str]:
    return {row[0]: row[1] for row in table(page, name).rows}


def test_a_run_has_its_figures_and_what_it_was(tmp_path: Path) -> None:
    page = runs_page([write_run(tmp_path / "run", records())])
    assert page.title == "Run run"
    assert page.summary == (
        "llama-nano trained with Muon at a learning rate of 0.02: validation loss 3.250 nats per "
        "token, 1.000 below a bigram model."
    )
    assert [section.title for section in page.sections] == [
        "Results", "Optimizer", "Speed", "Configuration", "Commands", "Data", "Samples", "Versions",
    ]  # fmt: skip
    results = cells(page, "results")
    assert results["validation loss, nats per token"] == "3.2500"
    assert results["its difference to the bigram baseline"] == "-1.0000"
    assert results["standard error of the validation loss"] == "0.0123"
    assert results["training tokens"] == "163,840"
    assert results["optimizer's share of the time"] == "8.6%"
    assert cells(page, "settings")["optimizer.lr"] == "0.02"
    assert table(page, "data").rows == (
        ("books", "1,000,000", "50,000", "163,840", "100.0%", "0.16"),
    )
    assert cells(page, "versions")["torch"] == "2.13.0"
    assert texts(page, "Samples") == [RESULT["sample"]]
    assert set(charts(page)) == {
        "loss", "loss-step", "loss-time", "learning-rate", "gradient-norm", "update-rms",
        "tokens-per-second", "optimizer-share",
    }  # fmt: skip


def test_losses_stand_at_their_tokens_steps_and_seconds(tmp_path: Path) -> None:
    found = charts(runs_page([write_run(tmp_path / "run", records())]))
    steps = np.arange(1, 41)
    for name, x in (("loss", 4096 * steps), ("loss-step", steps), ("loss-time", steps / 2)):
        training_loss, validation = lines_of(found[name])
        np.testing.assert_allclose(training_loss.x, x)
        np.testing.assert_allclose(validation.x, x[9::10])
        assert validation.y == tuple(3.2 + 4 / step for step in (10, 20, 30, 40))
        assert [(mark.label, mark.at) for mark in found[name].marks] == [
            ("unigram 6.000", 6.0),
            ("bigram 4.250", 4.25),
        ]


def test_noisy_curves_are_means_of_windows_with_their_range(tmp_path: Path) -> None:
    found = charts(runs_page([write_run(tmp_path / "run", records())]))["loss"]
    faint, series = found.series[:2]
    losses = 3 + 4 / np.arange(1, 41)
    assert series.y[10] == pytest.approx(losses[9:12].mean())
    assert (faint.kind, faint.color_group, faint.y) == ("faint", series.name, tuple(losses))
    smoothings = dict(series.smoothings)
    assert list(smoothings) == ["none", "weak", "medium", "strong"]
    assert smoothings["none"][10] == pytest.approx(losses[10], abs=1e-5)
    assert smoothings["strong"][10] == pytest.approx(losses[8:13].mean(), abs=1e-5)
    assert "moving means" in found.caption
    speed = charts(runs_page([write_run(tmp_path / "speed", records())]))["tokens-per-second"]
    (series,) = speed.series
    assert series.low is not None and series.high is not None
    assert (series.low[10], series.high[10]) == (8010, 8012)
    few = charts(runs_page([write_run(tmp_path / "few", records(10))]))["loss"].series[0]
    assert few.y == tuple(losses[:10]) and few.low is None and few.kind == "both"


def test_long_runs_are_thinned_and_keep_their_ends_and_extremes(tmp_path: Path) -> None:
    lines = [training(step) for step in range(1, 5001)]
    lines[2999]["loss"] = 50.0
    chart = charts(runs_page([write_run(tmp_path / "run", lines, result=None)]))["loss-step"]
    faint, series = chart.series
    assert len(series.x) < 800 and (series.x[0], series.x[-1]) == (1, 5000)
    assert 1000 < len(faint.x) <= 1200 and max(faint.y) == 50.0 and min(faint.y) == 3 + 4 / 5000


def test_a_diverged_run_does_not_flatten_the_rest(tmp_path: Path) -> None:
    lines = records()
    lines[38]["loss"] = 1e6
    found = charts(runs_page([write_run(tmp_path / "run", lines)]))["loss"]
    assert found.y_limits is not None and found.y_limits[1] == pytest.approx(10.5)
    assert charts(runs_page([write_run(tmp_path / "ok", records())]))["loss"].y_limits is None


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    lines = records()
    lines[19]["loss"] = None
    series = lines_of(charts(runs_page([write_run(tmp_path / "run", lines)]))["loss"])[0]
    assert [step for step, y in enumerate(series.y) if math.isnan(y)] == [19]


def test_optimizer_and_speed(tmp_path: Path) -> None:
    page = runs_page([write_run(tmp_path / "run", records())])
    found = charts(page)
    assert [series.name for series in found["learning-rate"].series] == ["all groups"]
    norms = {series.name: series.y[5] for series in found["gradient-norm"].series}
    assert norms == {"hidden": 3.0, "norm": 4.0} and found["gradient-norm"].log_y
    assert [mark.at for mark in found["update-rms"].marks] == [0.2]
    assert found["optimizer-share"].series[0].y[0] == pytest.approx(10)
    assert texts(page, "Optimizer") == [
        "Spikes of gradients: steps 25. Spikes of Muon updates: none. Steps skipped for gradients "
        "that are not finite: 1."
    ]


def test_routing_attention_and_telemetry_where_they_were_recorded(tmp_path: Path) -> None:
    lines = [training(s) | routed(s) | (heard(s) if s % 5 == 0 else {}) for s in range(1, 41)]
    lines += [telemetry(step) for step in (10, 20, 30)]
    found = charts(runs_page([write_run(tmp_path / "run", lines)]))
    assert [s.y[3] for s in found["max-violation"].series] == [1.0, 2.0]
    assert {"expert-shares", "dead-experts", "routing-entropy"} <= found.keys()
    layers = found["attention-logits"].series
    assert [series.name for series in layers] == ["layer 0", "layer 1"]
    assert layers[1].x == tuple(4096.0 * s for s in range(5, 41, 5))
    assert layers[1].y == tuple(float(s + 1) for s in range(5, 41, 5))
    assert "large-logits" not in found  # there were none
    entropy = found["weight-svd-entropy"].series
    assert [series.name for series in entropy] == ["AttnQO", "Dense"]
    assert entropy[0].x == (40960.0, 81920.0, 122880.0)
    assert "update-stable-rank" not in found  # not recorded


def test_the_noise_scale_stands_beside_the_batch(tmp_path: Path) -> None:
    lines = [training(step) for step in range(1, 41)]
    for step, scale in ((10, None), (20, 9000.0), (30, 12000.0)):
        noise = {"gradient_sq": 0.5, "trace": 1.0, "tokens_small": 2048, "tokens_big": 4096}
        lines[step - 1]["noise_scale"] = noise | {"scale": scale}
    chart = charts(runs_page([write_run(tmp_path / "run", lines)]))["noise-scale"]
    assert [series.name for series in chart.series] == ["noise scale", "batch"]
    assert [series.y for series in chart.series] == [(9000.0, 12000.0), (4096.0, 4096.0)]
    assert chart.series[0].x == chart.series[1].x == (81920.0, 122880.0) and chart.log_y
    for line in lines[1::2]:  # in every second step: a curve, and no lone points
        line["noise_scale"] = {"scale": 9000.0, "tokens_big": 4096}
    often = charts(runs_page([write_run(tmp_path / "often", lines)]))["noise-scale"]
    assert often.series[0].y == (9000.0,) * 20
    never = lines[:1]
    assert "noise-scale" not in charts(runs_page([write_run(tmp_path / "b", never, result=None)]))


def test_many_layers_are_summed_up(tmp_path: Path) -> None:
    lines = [training(step) | heard(step, layers=11) for step in range(1, 6)]
    found = charts(runs_page([write_run(tmp_path / "run", lines, result=None)]))
    ends = {series.name: series.y[0] for series in found["attention-logits"].series}
    assert ends == {
        "largest of the layers": 11.0, "median layer": 6.0, "smallest of the layers": 1.0,
    }  # fmt: skip


def test_an_unfinished_run_says_how_far_it_is_and_how_to_go_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(20), result=None)
    page = runs_page([folder])
    assert texts(page, "Results") == ["The run is not finished: 20 of 40 steps are recorded."]
    assert cells(page, "results")["validation loss, nats per token"] == "3.4000"
    assert texts(page, "Commands")[-1] == f"muonscale train {folder} --resume"
    assert charts(page)["loss"].marks == ()


DAMAGE = {
    "config.json": ("{", "config.json cannot be read"),
    "env.json": ("[1]", "env.json holds [1] and not a JSON object"),
    "result.json": ("{", "result.json cannot be read"),
    "metrics.jsonl": ("", "metrics.jsonl has no records: there are no curves."),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_a_sentence_and_the_rest_is_shown(name: str, tmp_path: Path) -> None:
    content, said = DAMAGE[name]
    folder = write_run(tmp_path / "run", records())
    (folder / name).write_text(content)
    page = runs_page([folder])
    assert any(said in text for text in texts(page, "Results"))
    assert ("loss" in charts(page)) == (name != "metrics.jsonl")


def test_a_config_of_another_version_is_a_sentence(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records())
    tree = json.loads((folder / "config.json").read_text())
    tree["optimizer"]["rule_of_tomorrow"] = 1
    (folder / "config.json").write_text(json.dumps(tree))
    (said,) = texts(runs_page([folder]), "Results")
    assert said.startswith(
        "This version does not understand config.json: unknown key optimizer.rule"
    )


def test_damaged_lines_are_left_out_and_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[4], lines[6] = "{", '{"step": 3}'
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "tr']))
    page = runs_page([folder])
    assert texts(page, "Results") == ["Lines 5, 7 of metrics.jsonl cannot be read and left out."]
    steps = lines_of(charts(page)["loss-step"])[0].x
    assert len(steps) == 38 and 5 not in steps and 7 not in steps


def test_of_a_step_written_twice_the_last_counts(tmp_path: Path) -> None:
    lines = [training(1), training(2), training(2) | {"loss": 9.0}]
    page = runs_page([write_run(tmp_path / "run", lines, result=None)])
    assert charts(page)["loss"].series[0].y == (7.0, 9.0)


def test_an_empty_run_is_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], result=None, env={})
    page = runs_page([folder])
    assert not page.charts and "The run is not finished: 0 of 40" in texts(page, "Results")[0]


def test_the_command_from_a_recipe_makes_the_same_run(tmp_path: Path) -> None:
    words = [
        "optimizer.lr=0.005",
        "optimizer.overrides={router: {rule: adamw}}",
        'eval.prompt="12"',
    ]
    words += ["optimizer.eps=1e-9", "run.path=x/y"]
    source = ["data.source=hf:a/b", "train.steps=7"]
    cases = [("demo", source), ("moonlight-nano-stages", []), ("essential-1b-dclm", source)]
    for recipe, more in cases:
        config = load_config(recipe, [*words, *more])
        program, verb, *rest = shlex.split(reproduce_command(config, "x/y"))
        assert (program, verb) == ("muonscale", "train")
        assert load_config(rest[0], rest[1:]) == config
        assert rest[0] == recipe and len(rest) == 1 + len(words) + len(more)


def test_the_started_command_is_as_it_was_typed(tmp_path: Path) -> None:
    page = runs_page([write_run(tmp_path / "run", records())])
    assert texts(page, "Commands")[1] == "muonscale train demo 'run.path=a b'"


@pytest.fixture
def three(tmp_path: Path) -> Page:
    muon = write_run(tmp_path / "a" / "muon", [training(s) | routed(s) for s in range(1, 41)])
    lines = [line | ({"update_rms": 0.0} if line["kind"] == "train" else {}) for line in records()]
    words = ["optimizer.rule=adamw", "optimizer.lr=0.003"]
    adamw = write_run(tmp_path / "adamw", lines, *words, result=RESULT | {"validation_loss": 3.5})
    half = write_run(tmp_path / "b" / "muon", records(20), "run.seed=1", result=None)
    return runs_page([muon, adamw, half])


def test_several_runs_are_compared(three: Page) -> None:
    assert three.title == "Comparison of 3 runs"
    results = table(three, "results")
    assert [row[:3] for row in results.rows] == [
        ("a/muon", "finished", "3.2500"),
        (next(r[0] for r in results.rows if "adamw" in r[0]), "finished", "3.5000"),
        ("b/muon", "stopped after step 20", "3.4000"),
    ]
    differences = {row[0]: row[1:] for row in table(three, "differences").rows}
    assert differences == {
        "optimizer.rule": ("muon", "adamw", "muon"),
        "optimizer.lr": ("0.02", "0.003", "0.02"),
        "run.seed": ("0", "0", "1"),
    }


def test_several_runs_have_one_curve_each(three: Page) -> None:
    found = charts(three)
    names = [row[0] for row in table(three, "results").rows]
    assert [series.name for series in found["gradient-norm"].series] == names
    assert all(series.low is None for series in found["gradient-norm"].series)
    for name in ("loss", "loss-step", "loss-time"):
        assert [(s.color_group, s.name) for s in lines_of(found[name])] == [
            *((run, f"{run}, training") for run in names),
            *((run, f"{run}, validation") for run in names[1:]),
        ]
    assert found["gradient-norm"].series[0].y[0] == pytest.approx(5.0)  # of 3 and 4
    assert [s.name for s in found["max-violation"].series] == ["a/muon"]
    # A run without Muon records zeros, which are no sizes of updates.
    assert [s.name for s in found["update-rms"].series] == [names[0], names[2]]
    assert [mark.label for mark in found["loss"].marks] == [
        "unigram 6.000",
        "bigram 4.250",
    ]


def test_telemetry_of_several_runs_has_a_chart_for_every_kind(tmp_path: Path) -> None:
    lines = [training(10), evaluation(10), telemetry(10)]
    paths = [write_run(tmp_path / name, lines, result=None) for name in "ab"]
    found = charts(runs_page(paths))
    assert {"weight-svd-entropy-AttnQO", "weight-svd-entropy-Dense"} <= found.keys()
    assert [s.name for s in found["weight-svd-entropy-Dense"].series] == ["a", "b"]


def test_one_folder_named_twice_is_one_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records())
    assert runs_page([folder, tmp_path / "x" / ".." / "run"]).title == "Run run"


def tiles(page: Page) -> dict[str, tuple[str, str]]:
    (block,) = (block for block in page.blocks if isinstance(block, Tiles))
    return {tile.label: (tile.value, tile.note) for tile in block.tiles}


def test_the_result_is_seen_first(tmp_path: Path, three: Page) -> None:
    flops = {"flops": {"per_token": 10_000_000}}
    page = runs_page([write_run(tmp_path / "run", records(), env=ENV | flops)])
    assert isinstance(page.blocks[0], Tiles) and isinstance(page.blocks[1], ChartViews)
    assert tiles(page) == {
        "validation loss": ("3.250", "nats per token, 1 below a bigram model"),
        "bits per byte": ("1.500", "perplexity 25.79"),
        "training tokens": ("163,840", "40 steps"),
        "training time": ("20 s", "1.64 TFLOP"),
        "tokens per second": ("8,192", "median; the optimizer took 8.6%"),
    }
    assert tiles(three)["lowest validation loss"] == ("3.250", "a/muon")
    assert tiles(three)["next in loss"] == ("+0.15", "b/muon")
    assert tiles(three)["finished"] == ("2 of 3", "runs")


def test_losses_stand_at_their_flops_where_these_are_known(tmp_path: Path) -> None:
    known = write_run(tmp_path / "a", records(), env=ENV | {"flops": {"per_token": 1e7}})
    unknown = write_run(tmp_path / "b", records())
    chart = charts(runs_page([known, unknown]))["loss-flops"]
    training_loss, validation = lines_of(chart)
    assert (training_loss.name, validation.name) == ("a, training", "a, validation")
    np.testing.assert_allclose(training_loss.x, 1e7 * 4096 * np.arange(1, 41))


def test_losses_of_different_tokenizers_are_in_bits_per_byte(tmp_path: Path) -> None:
    result = RESULT | {"validation_loss": 4.0, "bits_per_byte": 1.4}
    paths = [
        write_run(tmp_path / "small", records()),
        write_run(tmp_path / "large", records(), "data.vocab_size=4096", result=result),
    ]
    page = runs_page(paths)
    assert "The runs have different tokenizers" in texts(page, "Results")[0]
    chart = charts(page)["loss"]
    assert chart.y_label == "loss (bits per byte)" and chart.marks == ()
    last = {series.name: series.y[-1] for series in lines_of(chart) if "valid" in series.name}
    assert last["small, validation"] == pytest.approx(3.3 * 1.5 / 3.25)
    assert last["large, validation"] == pytest.approx(3.3 * 1.4 / 4.0)
    assert tiles(page)["lowest bits per byte"] == ("1.400", "large")
    for path in paths:  # the same file is the same tokenizer, whatever the settings say
        (path / "tokenizer").mkdir()
        (path / "tokenizer" / "tokenizer.json").write_text("{}")
    assert charts(runs_page(paths))["loss"].y_label == "loss (nats per token)"


def test_runs_of_different_data_are_said_to_be(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "a", records())]
    paths.append(write_run(tmp_path / "b", records(), "data.path=b.txt"))
    assert "losses are of different texts" in texts(runs_page(paths), "Results")[0]
