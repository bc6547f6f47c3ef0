from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.files import drop_nonfinite
from muonscale.lab.report.page import Chart, Table
from muonscale.lab.studies.compare.study import CompareStudy
from muonscale.lab.studies.kinds import load_study
from muonscale.lab.studies.planned_run import PlannedRun
from muonscale.lab.studies.search.report import search_charts, settings_table
from muonscale.lab.studies.search.variant_search import VariantSearch, expect_search, search_places
from muonscale.lab.studies.study import Outcomes
from tests.lab.studies.conftest import end_all, end_with, search_both

Make = Callable[..., CompareStudy]
LENGTHS = {"length": {"a": {"train.steps": 3}, "b": {"train.steps": 4}}}


def rates(run: PlannedRun) -> tuple[float, float]:
    return run.config.optimizer.lr, run.config.optimizer.adamw_lr or 0.02


def valley(run: PlannedRun) -> float:
    """Return losses that are lowest at lr 0.04, for AdamW 0.01, and rest 0.02, with 4 steps 0.04."""
    lr, rest = rates(run)
    best = (
        0.01 if run.coordinates["variant"] == "adamw" else 0.04,
        0.04 if run.config.steps == 4 else 0.02,
    )
    away = [math.log2(x / b) for x, b in zip((lr, rest), best, strict=True)]
    return 3 + 0.1 * sum(abs(x) for x in away) + 0.01 * int(run.coordinates["seed"])


def searches(study: CompareStudy, outcomes: Outcomes) -> list[dict[str, VariantSearch]]:
    return [found for _, found in study._searched(outcomes)]


def test_runs_have_the_values_of_their_setting_and_the_seeds_of_the_search(compare: Make) -> None:
    section = search_both(seeds=[5, 6])
    section["keys"]["lr"]["start_of"] = {"adamw": 0.003}
    section["keys"]["rest"]["ratio"] = 3
    runs = compare(search=section).plan({})
    assert [(r.coordinates["variant"], *rates(r), r.config.run.seed) for r in runs] == [
        *[("adamw", 0.003, 0.02, seed) for seed in (5, 6)],
        *[("muon", 0.02, 0.02, seed) for seed in (5, 6)],
    ]
    more = compare(search=section).plan({r.id: end_with(valley)(r) for r in runs})
    assert {rates(r) for r in more if r.coordinates["variant"] == "muon"} == {
        (0.01, 0.02), (0.02, 0.02), (0.04, 0.02)
    }  # fmt: skip


def test_the_best_setting_has_the_lowest_mean_over_the_seeds(compare: Make) -> None:
    study = compare(search=search_both(seeds=[5, 6]))

    def lucky(run: PlannedRun) -> float:
        return valley(run) - 1.0 * (rates(run)[0] == 0.01 and run.config.run.seed == 5)

    (found,) = searches(study, end_all(study, end_with(lucky)))
    assert found["muon"].best == {"lr": 0.01, "rest": 0.02}
    (found,) = searches(study, end_all(study, end_with(valley)))
    assert found["muon"].best == {"lr": 0.04, "rest": 0.02}


def test_a_value_beyond_the_range_of_its_key_ends_no_study(compare: Make) -> None:
    keys = {"momentum": {"key": "optimizer.momentum", "start": 0.9, "ratio": 1.08}}
    keys["momentum"]["variants"] = ["muon"]
    keys["lr"] = {"key": "optimizer.lr", "start": 0.02, "variants": ["adamw"]}
    study = compare(search={"keys": keys, "settings": 3, "most": 9})

    def rising(run: PlannedRun) -> float:
        return 3 - run.config.optimizer.momentum

    (found,) = searches(study, end_all(study, end_with(rising)))
    muon = found["muon"]
    assert muon.ended and muon.best == {"momentum": 0.972} and not muon.tuned
    assert muon.edges == ["momentum high"]
    assert all(run.config.optimizer.momentum < 1 for run in muon.runs)
    keys["momentum"]["start"] = 1.2
    with pytest.raises(ConfigError, match="momentum"):
        compare(search={"keys": keys, "settings": 3, "most": 9}).plan({})


def test_a_later_place_begins_at_the_best_of_the_one_before(compare: Make) -> None:
    study = compare(axes=LENGTHS, search=search_both())
    assert len(searches(study, {})) == 1  # the second is not known yet
    outcomes = end_all(study, end_with(valley))
    first, second = searches(study, outcomes)
    assert first["muon"].best == {"lr": 0.04, "rest": 0.02}
    assert second["muon"].tried[0][0] == first["muon"].best
    assert second["adamw"].tried[0][0] == first["adamw"].best == {"lr": 0.01, "rest": 0.02}
    assert all(found.tuned for place in (first, second) for found in place.values())


def test_places_that_begin_at_the_start_wait_for_none(compare: Make) -> None:
    study = compare(axes=LENGTHS, search=search_both(begin="start"))
    assert [place["muon"].tried[0][0] for place in searches(study, {})] == 2 * [
        {"lr": 0.02, "rest": 0.02}
    ]
    assert {run.config.steps for run in study.plan({})} == {3, 4}


def test_the_first_place_can_choose_for_all(compare: Make) -> None:
    study = compare(axes=LENGTHS, search=search_both(at="first"), seeds=[7])
    outcomes = end_all(study, end_with(valley))
    later = [o.run for o in outcomes.values() if o.run.config.steps == 4]
    assert {(r.coordinates["variant"], *rates(r), r.config.run.seed) for r in later} == {
        ("adamw", 0.01, 0.02, 7), ("muon", 0.04, 0.02, 7)
    }  # fmt: skip


def test_a_key_of_one_variant_is_searched_for_it_alone(compare: Make) -> None:
    section = search_both()
    section["keys"]["rest"]["variants"] = ["muon"]
    study = compare(search=section)
    (found,) = searches(study, end_all(study, end_with(valley)))
    assert (found["adamw"].names, found["muon"].names) == (("lr",), ("lr", "rest"))
    assert len(found["adamw"].tried) == len(found["muon"].tried) >= 5
    assert {run.config.optimizer.adamw_lr for run in found["adamw"].runs} == {None}


def test_what_was_searched_is_shown(compare: Make) -> None:
    study = compare(search=search_both(most=5))

    def hot(run: PlannedRun) -> float:
        return math.inf if rates(run)[0] >= 0.08 else valley(run)

    (found,) = searches(study, end_all(study, end_with(hot)))
    rows = drop_nonfinite([{"name": name, **search.tree()} for name, search in found.items()])
    assert [row["edges"] for row in rows] == [["rest high"], ["rest high"]]
    table = settings_table("settings", rows)
    assert isinstance(table, Table) and len(table.rows) == 2 * 5
    adamw, muon = table.rows[0], table.rows[5]
    assert adamw[:2] == ("adamw", "lr 0.01, rest 0.02")
    assert adamw[3] == "best, at an edge: rest high"
    assert muon[1:] == ("lr 0.04, rest 0.02", "3.0000", "best, at an edge: rest high")
    assert any("diverged" in row[2] for row in table.rows[5:])
    lr, rest = search_charts("search", rows, ["lr", "rest"])
    assert isinstance(lr, Chart)
    assert [series.x for series in lr.series][1] == (0.01, 0.02, 0.04)
    assert [series.x for series in rest.series][1] == (0.01, 0.02)


def test_a_search_is_counted_before_it_ends(compare: Make) -> None:
    study = compare(search=search_both(seeds=[5, 6]))
    (example, *_) = study.plan({})
    section = study.config.search
    unknown = expect_search(section, "x", example, None)
    assert (unknown.runs, unknown.most) == (5 * 2, 12 * 2)
    outcomes = end_all(study, end_with(valley))
    (found,) = searches(study, outcomes)
    ended = expect_search(section, "x", example, found["muon"])
    assert ended.runs == ended.most == len(found["muon"].runs)
    assert sum(e.runs for e in study.expected(outcomes)) == len(outcomes)


def test_only_losses_of_all_seeds_count(compare: Make) -> None:
    study = compare(search=search_both(seeds=[5, 6]))
    runs = study.plan({})
    half = {run.id: end_with(valley)(run) for run in runs if run.config.run.seed == 5}
    assert [run.id for run in study.plan(half)] == [run.id for run in runs]
    broken = end_with(lambda run: math.nan if run.config.run.seed == 6 else valley(run))
    outcomes = end_all(study, broken)
    places = search_places(study.config.search, ["muon"], [lambda *_: runs[2]], outcomes)
    assert len(outcomes) == 4 and places
    assert "no setting of the search" in study.analyze(outcomes)["stopped"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("search=5", r"search=5"),
        ("search.keys={}", r"search\.keys"),
        ("search.keys.lr.key=lr", r"search\.keys\.lr\.key='lr' must have the form section\.key"),
        ("search.keys.lr.key=run.seed", r"key=run\.seed: the study sets it itself"),
        ("search.keys.lr.key=train.tokens", r"key=train\.tokens: the study sets it itself"),
        ("search.keys.lr.key=optimizer.adamw_lr", "another searched key is the same"),
        ("search.keys.lr.strat=1", r"search\.keys\.lr\.strat; did you mean start"),
        ("search.keys.lr.start=0", "greater than 0"),
        ("search.keys.lr.ratio=1", r"greater than or equal to 1\.001"),
        ("search.keys.lr.start_of.sgd=1", r"search\.keys\.lr\.start_of: no variant 'sgd'"),
        ("search.keys.lr.variants=[adam]", "no variant 'adam'; did you mean adamw"),
        ("search.keys={seed: {key: optimizer.lr, start: 1}}", "runs have a seed already"),
        ("search.keys={a b: {key: optimizer.lr, start: 1}}", "'a b' cannot be part"),
        (
            "search.keys={lr: {key: optimizer.lr, start: 1, variants: [muon]}}",
            "no key is searched for adamw",
        ),
        ("search.most=3", r"search\.most=3 must be at least search\.settings=9"),
        ("search.seeds=[1, 1]", r"search\.seeds=\[1, 1\] repeats 1"),
        ("search.at=last", "'every' or 'first'"),
        ("search.begin=end", "'previous' or 'start'"),
        ("set.optimizer.lr=0.1", r"set has optimizer\.lr, which search\.keys\.lr searches"),
        (
            "variants={adamw: {}, muon: {optimizer.lr: 0.1}}",
            r"variants\.muon has optimizer\.lr, which search\.keys\.lr searches for muon",
        ),
        ("axes={a: {b: {optimizer.lr: 0.1}}}", r"axes\.a\.b has optimizer\.lr"),
        ("axes={lr: {b: {train.batch_tokens: 256}}}", "an axis has this name"),
    ],
)
def test_wrong_sections_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_study("muon-adamw-nano", [override])


def test_a_key_that_a_known_variant_sets_is_not_searched_for_it() -> None:
    keys: dict[str, Any] = {"wd": {"key": "optimizer.weight_decay", "start": 0.1}}
    words = [f"search.keys={keys}", "variants=[adamw, muon-no-wd]"]
    with pytest.raises(ConfigError, match=r"variants: muon-no-wd has optimizer\.weight_decay"):
        load_study("muon-adamw-nano", words)
