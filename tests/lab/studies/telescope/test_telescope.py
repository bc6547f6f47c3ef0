from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from muonscale.errors import ConfigError, StudyError
from muonscale.lab.estimate.run_cost import run_cost
from muonscale.lab.report.page import Chart, Verdict
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.studies.cost import estimate_cost, format_hours
from muonscale.lab.studies.engine import StudyState, analyze_study, plan_study
from muonscale.lab.studies.planned_run import PlannedRun, index_runs
from muonscale.lab.studies.study import Outcome
from muonscale.lab.studies.telescope.analysis import analyze_level, judge_previous_optimum
from muonscale.lab.studies.telescope.config import TelescopeConfig
from muonscale.lab.studies.telescope.drift import fit_drift, ratio_interval
from muonscale.lab.studies.telescope.grid import Grid, Place
from muonscale.lab.studies.telescope.levels import Level, best_place, build_levels
from muonscale.lab.studies.telescope.study import TelescopeStudy
from muonscale.lab.studies.text import hours_left, plan_json, study_plan_text

Make = Callable[..., TelescopeStudy]
Loss = Callable[[PlannedRun], float]
LR = {"key": "optimizer.lr", "center": 0.02, "ratio": 2}
WD = {"key": "optimizer.weight_decay", "center": 0.1, "ratio": 2}


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("telescope.analysis", "telescope.law"):
        monkeypatch.setattr(f"muonscale.lab.studies.{module}.RESAMPLES", 100)


@pytest.fixture
def telescope(tiny_keys: dict[str, Any], tmp_path: Path) -> Make:
    """Make a telescope of widths 16, 32, 64 and then 128; keywords replace its keys."""

    def make(**keys: Any) -> TelescopeStudy:
        given = {
            "path": tmp_path / "study",
            "set": tiny_keys,
            "hyperparameters": {"lr": LR, "wd": WD},
            "points": 8,
            "base_width": 16,
            "calibration_width": 64,
            "target_width": 128,
            "executor": {"kind": "inline", "flops_per_second": 1e9},
        }
        return TelescopeStudy(TelescopeConfig.model_validate(given | keys))

    return make


def where(run: PlannedRun) -> dict[str, Any]:
    return dict(run.coordinates)


def outcome(run: PlannedRun, loss: float) -> Outcome:
    folder = RunFolder(Path("nowhere"))
    if math.isnan(loss):
        return Outcome(run, folder, "failed", reason="no disk")
    if math.isinf(loss):
        return Outcome(run, folder, "diverged", reason="inf")
    seconds = float(run.coordinates["width"]) / 16
    result = {"validation_loss": loss, "train_seconds": seconds, "step": run.config.steps}
    return Outcome(run, folder, "finished", result)


def ended(study: TelescopeStudy, loss: Loss, rounds: int = 99) -> dict[str, Outcome]:
    """Return outcomes as if every run had ended with a loss, those of later plans included."""
    outcomes: dict[str, Outcome] = {}
    for _ in range(rounds):
        runs = study.plan(outcomes)
        assert list(index_runs(runs).values()) == runs
        assert outcomes.keys() <= {run.id for run in runs}  # a plan never shrinks
        if len(runs) == len(outcomes):
            break
        outcomes = {run.id: outcomes.get(run.id) or outcome(run, loss(run)) for run in runs}
    return outcomes


def found_with(study: TelescopeStudy, loss: Loss) -> dict[str, Any]:
    """Return what is found, as result.json has it."""
    outcomes = ended(study, loss)
    state = StudyState({id: o.run for id, o in outcomes.items()}, outcomes)
    return json.loads(json.dumps(analyze_study(study, state)))


def values(
    study: TelescopeStudy, outcomes: Mapping[str, Outcome], width: int
) -> list[tuple[float, ...]]:
    names = list(study.config.hyperparameters)
    rows = [where(o.run) for o in outcomes.values()]
    return sorted({tuple(r[n] for n in names) for r in rows if r["width"] == width})


def axis(
    study: TelescopeStudy, outcomes: Mapping[str, Outcome], width: int, place: int
) -> list[float]:
    return sorted({value[place] for value in values(study, outcomes, width)})


def drawn(coordinates: dict[str, Any]) -> float:
    """Return a number of the standard normal distribution that these coordinates always have."""
    key = [round(1e6 * value) for value in coordinates.values()]
    return float(np.random.default_rng(key).standard_normal())


def bowl(
    lr: float = 0.03,
    wd: float = 0.1,
    slope: float = 0.0,
    seed_effect: float = 0.1,
    noise: float = 0.0,
) -> Loss:
    """Return a loss whose optimum is at lr * exp(slope/width), and falls as 2 + 8/sqrt(width)."""

    def loss(run: PlannedRun) -> float:
        c = where(run)
        off = math.log(c["lr"] / lr) - slope / c["width"]
        value = 2 + 8 / math.sqrt(c["width"]) + 0.1 * off**2 + seed_effect * c["seed"]
        value += 0.05 * math.log(c.get("wd", wd) / wd) ** 2
        return value + noise * drawn(c)

    return loss


def test_the_grids_are_those_of_the_paper(telescope: Make) -> None:
    study = telescope()
    outcomes = ended(study, bowl(lr=0.029, wd=0.14))
    first = [0.02 * 2 ** (n - 3.5) for n in range(8)]
    assert axis(study, outcomes, 16, 0) == pytest.approx(first, rel=1e-5)
    # lr: 0.0283 = 0.02 * 2^0.5 is the nearest to 0.029; spacing 2^0.5, then 2^0.25.
    assert axis(study, outcomes, 32, 0) == pytest.approx(
        [0.02 * 2 ** (0.5 + n / 2) for n in (-2, -1, 0, 1, 2)], rel=1e-5
    )
    assert axis(study, outcomes, 64, 0) == pytest.approx(
        [0.02 * 2 ** (0.5 + n / 4) for n in (-1, 0, 1)], rel=1e-5
    )
    assert axis(study, outcomes, 64, 1) == pytest.approx(
        [0.1 * 2 ** (0.5 + n / 4) for n in (-1, 0, 1)], rel=1e-5
    )
    counts = [len(values(study, outcomes, width)) for width in (16, 32, 64, 128)]
    assert counts == [64, 25, 9, 1]
    assert len(outcomes) == 2 * (64 + 25 + 9) + 1
    assert values(study, outcomes, 128) == [pytest.approx((0.02 * 2**0.5, 0.1 * 2**0.5), rel=1e-5)]


def test_a_level_waits_for_all_runs_of_the_one_before(telescope: Make) -> None:
    study = telescope(points=3)
    outcomes = ended(study, bowl(lr=0.02), rounds=1)
    assert {where(run)["width"] for run in study.plan(dict(list(outcomes.items())[1:]))} == {16}
    assert {where(run)["width"] for run in study.plan(outcomes)} == {16, 32}


def test_runs_are_widened_and_transferred(telescope: Make, tiny_keys: dict[str, Any]) -> None:
    keys = {**tiny_keys, "model.fields": {"num_hidden_layers": 3}}
    study = telescope(points=3, set=keys, convention="adam_table", target_seeds=[4, 5])
    outcomes = ended(study, bowl(lr=0.02))
    by_width = {where(o.run)["width"]: o.run.config for o in outcomes.values()}
    base = {
        "hidden_size": 16,
        "intermediate_size": 44,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    assert by_width[16].model.fields == {"num_hidden_layers": 3, **base}
    assert by_width[16].transfer.base is None
    assert by_width[128].model.fields == {
        "num_hidden_layers": 3,
        **{key: 8 * value for key, value in base.items()},
    }
    assert by_width[128].transfer.base == base
    assert by_width[128].transfer.convention == "adam_table"
    assert (by_width[128].optimizer.lr, by_width[128].optimizer.weight_decay) == (0.02, 0.1)
    seeds = [where(o.run)["seed"] for o in outcomes.values() if where(o.run)["width"] == 128]
    assert seeds == [4, 5]


def test_an_optimum_at_an_end_extends_the_grid(telescope: Make) -> None:
    # The first grid ends at 0.04. 0.08 is better, and so a second line is added to see beyond it.
    study = telescope(points=3, seeds=[0], extend=2)
    outcomes = ended(study, bowl(lr=0.08))
    assert axis(study, outcomes, 16, 0) == [0.01, 0.02, 0.04, 0.08, 0.16]
    assert axis(study, outcomes, 16, 1) == [0.05, 0.1, 0.2]
    assert len(values(study, outcomes, 16)) == 15
    found = found_with(study, bowl(lr=0.08))
    assert found["levels"][0]["lines"] == 2
    assert found["levels"][0]["shape"] == [5, 3]
    assert found["stopped"] is None
    assert found["chosen"] == {"lr": 0.08, "wd": 0.1}


def test_a_direction_that_hardly_matters_has_its_optimum_inside(telescope: Make) -> None:
    def flat(run: PlannedRun) -> float:
        c = where(run)
        # The lowest weight decay is lucky by less than the noise of seeds.
        lucky = 0.001 if c["wd"] < 0.06 else 0.0
        return 3 + 0.1 * math.log(c["lr"] / 0.02) ** 2 - lucky + 0.003 * drawn(c)

    study = telescope(points=3, seeds=[0, 1], extend=2)
    found = found_with(study, flat)
    assert found["stopped"] is None
    assert [level["lines"] for level in found["levels"]] == [0, 0, 0]
    assert found["chosen"]["lr"] == pytest.approx(0.02, rel=0.3)
    # Told apart, it goes on.
    steep = found_with(study, lambda run: flat(run) + 0.1 * math.log(where(run)["wd"]))
    assert "the lowest wd" in steep["stopped"] and steep["levels"][0]["lines"] == 2


def test_a_corner_extends_both_ways(telescope: Make) -> None:
    study = telescope(points=3, seeds=[0], extend=2)
    outcomes = ended(study, bowl(lr=0.04, wd=0.05), rounds=2)
    assert axis(study, outcomes, 16, 0) == [0.01, 0.02, 0.04, 0.08]
    assert axis(study, outcomes, 16, 1) == [0.025, 0.05, 0.1, 0.2]
    assert len(values(study, outcomes, 16)) == 16


def test_a_corner_with_one_line_left_is_extended_one_way(telescope: Make) -> None:
    found = found_with(telescope(points=3, seeds=[0], extend=1), bowl(lr=0.04, wd=0.05))
    assert found["levels"][0]["shape"] == [4, 3]
    assert "the lowest wd that was tried, 0.05, and no more lines" in found["stopped"]


def test_beyond_the_budget_it_stops_and_says_so(telescope: Make) -> None:
    study = telescope(points=3, seeds=[0], extend=1)
    loss = bowl(lr=0.1)
    outcomes = ended(study, loss)
    assert {where(o.run)["width"] for o in outcomes.values()} == {16}
    found = found_with(study, loss)
    assert "width 16: the lowest loss is at the highest lr that was tried, 0.08" in found["stopped"]
    assert "extend=1" in found["stopped"]
    assert found["chosen"] is None
    # More budget goes on from where it was.
    more = telescope(points=3, seeds=[0], extend=3)
    assert {run.id for run in more.plan(outcomes)} > outcomes.keys()
    assert found_with(more, loss)["chosen"] == {
        "lr": pytest.approx(0.08 * 2**0.5, rel=1e-4),
        "wd": 0.1,
    }


def test_a_single_place_is_no_end(telescope: Make) -> None:
    study = telescope(points=3, hyperparameters={"lr": LR}, extend=0)  # 3 points, then 1, then 1
    outcomes = ended(study, bowl(lr=0.021))
    assert [len(values(study, outcomes, width)) for width in (16, 32, 64, 128)] == [3, 1, 1, 1]
    flat = telescope(points=3, hyperparameters={"lr": LR}, least_points=3)
    outcomes = ended(flat, bowl(lr=0.021))
    assert [len(values(flat, outcomes, width)) for width in (16, 32, 64, 128)] == [3, 3, 3, 1]


def test_diverged_places_bound_the_grid(telescope: Make) -> None:
    def hot(run: PlannedRun) -> float:
        return math.inf if where(run)["lr"] > 0.05 else bowl(lr=0.1)(run)

    study = telescope(points=3, hyperparameters={"lr": LR}, extend=1)
    found = found_with(study, hot)
    level = found["levels"][0]
    assert (level["best"], level["lines"], found["stopped"]) == ({"lr": 0.04}, 1, None)
    assert level["places"][-1]["mean"] is None
    assert "diverged" in level["optima"]["lr"]["note"]


def test_one_seed_that_diverges_is_enough(telescope: Make) -> None:
    def unlucky(run: PlannedRun) -> float:
        c = where(run)
        return math.inf if (c["lr"], c["seed"]) == (0.02, 1) else bowl(lr=0.02)(run)

    study = telescope(points=5, hyperparameters={"lr": LR})
    assert found_with(study, unlucky)["levels"][0]["best"] != {"lr": 0.02}


def test_a_grid_that_diverges_whole_stops(telescope: Make) -> None:
    study = telescope(points=3)
    found = found_with(study, lambda run: math.inf)
    assert "every place of the grid diverged" in found["stopped"]
    page = study.report(found, {})
    assert isinstance(page.sections[0].blocks[0], Verdict)
    assert page.sections[0].blocks[0].passed is False


def test_a_failed_run_stops_until_it_is_done(telescope: Make) -> None:
    study = telescope(points=3)
    outcomes = ended(study, bowl(lr=0.02), rounds=1)
    id, good = next(iter(outcomes.items()))
    failed = {**outcomes, id: outcome(good.run, math.nan)}
    assert len(study.plan(failed)) == len(failed)
    assert "runs failed" in study.analyze(failed)["stopped"]
    assert len(study.plan(outcomes)) > len(outcomes)


def test_the_drift_is_found(telescope: Make) -> None:
    # A parabola in log lr: the three points around the best one give its minimum exactly.
    found = found_with(telescope(points=5, seeds=[0]), bowl(lr=0.03, wd=0.1, slope=6.0))
    drift = found["drift"]["lr"]
    assert drift["slope"]["value"] == pytest.approx(6.0, rel=1e-3)
    assert drift["infinite"]["value"] == pytest.approx(0.03, rel=1e-3)
    assert drift["target"]["value"] == pytest.approx(0.03 * math.exp(6 / 128), rel=1e-3)
    assert drift["base"]["value"] == pytest.approx(0.03 * math.exp(6 / 16), rel=1e-3)
    assert found["drift"]["wd"]["slope"]["value"] == pytest.approx(0, abs=0.01)


def test_drift_within_noise_is_not_significantly_different(telescope: Make) -> None:
    study = telescope(points=5, extend=3)
    found = found_with(study, bowl(noise=0.003))
    drift = found["drift"]["lr"]
    assert drift["moves"] is False
    assert drift["slope"]["low"] < 0 < drift["slope"]["high"]
    level = found["levels"][0]
    optimum = level["optima"]["lr"]
    assert optimum["low"] < 0.03 < optimum["high"]
    assert optimum["closed"] is True
    assert 0.001 < level["sigma"] < 0.009  # seeds differ by 0.1, which is no noise
    moving = found_with(study, bowl(slope=12, noise=0.003))["drift"]["lr"]
    assert moving["moves"] is True
    assert moving["slope"]["value"] == pytest.approx(12, abs=3)


def test_intervals_of_the_drift_cover_it(telescope: Make) -> None:
    config, hits = telescope(points=5, extend=9, least_points=3).config, 0
    for number in range(60):
        rng = np.random.default_rng(number)
        drawn_once: dict[tuple[int, Place], dict[int, float]] = {}

        def known(
            width: int,
            place: Place,
            rng: np.random.Generator = rng,
            drawn_once: dict[tuple[int, Place], dict[int, float]] = drawn_once,
        ) -> dict[int, float]:
            at = config.values(place)
            bowl = math.log(at["lr"] / 0.03) - 6 / width
            loss = 3 + 0.1 * bowl**2 + 0.05 * math.log(at["wd"] / 0.1) ** 2
            new = {seed: loss + 0.1 * seed + 0.003 * float(rng.normal()) for seed in (0, 1)}
            return drawn_once.setdefault((width, place), new)

        slope = fit_drift(config, build_levels(config.rule, known))["lr"]["slope"]
        hits += slope["low"] <= 6 <= slope["high"]
    assert 0.8 <= hits / 60 <= 0.99


def test_one_seed_has_no_noise(telescope: Make) -> None:
    found = found_with(telescope(seeds=[0], extend=2), bowl(slope=6))
    assert found["levels"][0]["optima"]["lr"]["low"] is None
    assert found["drift"]["lr"]["slope"]["value"] == pytest.approx(6, rel=1e-3)
    assert found["stop_earlier"]["width"] is None
    assert "one seed" in found["stop_earlier"]["note"]


def test_with_one_seed_an_optimum_that_stays_is_no_verdict(telescope: Make) -> None:
    """The same place may be lowest at every width by luck, which one seed cannot tell."""
    study = telescope(seeds=[0], points=3, least_points=3, full_sweep="calibration")
    found = found_with(study, bowl(lr=0.02, wd=0.1))
    assert [level["before"]["gap"] for level in found["levels"][1:]] == [0.0, 0.0]
    assert [level["before"]["within"] for level in found["levels"][1:]] == [None, None]
    assert found["stop_earlier"]["width"] is None and "one seed" in found["stop_earlier"]["note"]
    sweep = found["full_sweep"]
    assert sweep["difference"] == 0 and sweep["within_noise"] is None and sweep["passed"] is None
    page = study.report(found, {})
    assert [verdict.passed for verdict in page.verdicts] == [None, None]
    assert not any("within seed noise" in verdict.text for verdict in page.verdicts)


def test_calibration_could_have_stopped_where_the_optimum_stays(telescope: Make) -> None:
    still = found_with(telescope(), bowl(lr=0.02 * 2**0.5, wd=0.1 * 2**0.5, noise=0.001))
    assert still["stop_earlier"]["width"] == 16
    assert "32, 64" in still["stop_earlier"]["note"]
    assert [level["before"]["within"] for level in still["levels"][1:]] == [True, True]
    # 0.02 * 2^0.5 at width 16, twice that at 32 and from there on.
    steps = {16: 0.5, 32: 1.5, 64: 1.5, 128: 1.5}

    def once(run: PlannedRun) -> float:
        return bowl(lr=0.02 * 2 ** steps[where(run)["width"]], wd=0.1 * 2**0.5, noise=0.001)(run)

    found = found_with(telescope(), once)
    assert [level["before"]["within"] for level in found["levels"][1:]] == [False, True]
    assert found["stop_earlier"]["width"] == 32
    gap = found["levels"][1]["before"]
    assert gap["gap"] == pytest.approx(0.1 * math.log(2) ** 2, abs=0.003)
    assert gap["low"] < 0.1 * math.log(2) ** 2 < gap["high"]


def test_calibration_goes_on_while_the_optimum_moves(telescope: Make) -> None:
    steps = {16: 0.5, 32: 0.5, 64: 0.75, 128: 1}

    def late(run: PlannedRun) -> float:
        return bowl(lr=0.02 * 2 ** steps[where(run)["width"]], noise=0.0002)(run)

    found = found_with(telescope(), late)
    assert found["stop_earlier"]["width"] is None
    assert "still moved beyond seed noise at width 64" in found["stop_earlier"]["note"]


def level_of(config: TelescopeConfig, loss: Callable[[dict[str, float], int], float]) -> Level:
    """Return the second level of a telescope whose first one was best in its middle."""
    center = (Fraction(0), Fraction(0))
    grid = Grid.around(center, 3, 1)
    losses = {p: {s: loss(config.values(p), s) for s in (0, 1)} for p in grid.places}
    return Level(1, 32, grid, center, 0, losses, best_place(losses, center), None, ())


def test_the_lucky_one_of_many_places_is_no_move(telescope: Make) -> None:
    # A flat loss: whichever of nine places is lowest, the middle is as good.
    config, hits = telescope().config, 0
    for number in range(100):
        rng = np.random.default_rng(number)

        def flat(at: dict[str, float], seed: int, rng: np.random.Generator = rng) -> float:
            return 3 + 0.1 * seed + 0.01 * float(rng.standard_normal())

        level = level_of(config, flat)
        assert level.center is not None
        before = judge_previous_optimum(level, level.center)
        assert before is not None
        assert before.gap >= 0
        hits += before.within is True
    assert hits >= 90


def test_intervals_of_the_optimum_cover_it(telescope: Make) -> None:
    config, hits, found = telescope().config, 0, 0
    for number in range(60):
        rng = np.random.default_rng(number)

        def noisy(at: dict[str, float], seed: int, rng: np.random.Generator = rng) -> float:
            bowl = math.log(at["lr"] / 0.021) ** 2 + math.log(at["wd"] / 0.098) ** 2
            return 3 + bowl + 0.1 * seed + 0.01 * float(rng.standard_normal())

        optimum = analyze_level(config, level_of(config, noisy)).optima["lr"]
        if not math.isnan(optimum.at):
            found += 1
            hits += optimum.low <= 0.021 <= optimum.high
    assert found >= 55
    assert 0.8 <= hits / found <= 0.98


def test_the_law_of_the_loss(telescope: Make) -> None:
    study = telescope(seeds=[0])
    exact = bowl(lr=0.02 * 2**0.5, wd=0.1 * 2**0.5, seed_effect=0)
    law = found_with(study, exact)["law"]
    assert law["widths"] == [16, 32, 64, 128]
    assert law["losses"] == pytest.approx([2 + 8 / math.sqrt(w) for w in (16, 32, 64, 128)])
    got = {name: p["value"] for name, p in law["parameters"].items()}
    assert got == pytest.approx({"offset": 2, "coefficient": 8, "exponent": 0.5}, rel=1e-4)
    short = telescope(seeds=[0], base_width=32)
    assert found_with(short, exact)["law"]["parameters"].keys() == {"coefficient", "exponent"}


def test_the_account_is_what_the_runs_cost(telescope: Make) -> None:
    study = telescope(extend=1, target_seeds=[0, 1, 2], full_sweep="calibration")
    state, cost = plan_study(study)
    tree = json.loads(plan_json(study, state, cost))["account"]
    one = {}
    for width in (16, 32, 64, 128):
        one[width] = run_cost(
            study.run(width, study.config.rule.first_grid.places[0], 0).config
        ).flops
    # Two seeds; a line added to an n x n grid makes n * (n + 1) places of it.
    got = [(line["runs"], line["most"], line["flops"]) for line in tree["lines"]]
    assert got == [
        (128, 144, one[16]),
        (50, 60, one[32]),
        (18, 24, one[64]),
        (3, 3, one[128]),
        (128, 128, one[64]),
        (128, 128, one[128]),
    ]
    tuning = 128 * one[16] + 50 * one[32] + 18 * one[64]
    assert tree["sums"]["tuning"]["flops"] == tuning
    assert tree["sums"]["tuning"]["seconds"] == pytest.approx(tuning / 1e9)
    whole = tuning + 3 * one[128]
    dearest = 144 * one[16] + 60 * one[32] + 24 * one[64] + 3 * one[128]
    assert tree["most"]["flops"] == dearest
    assert tree["tuning_share"]["flops"] == pytest.approx(tuning / whole)
    assert tree["of_instead"]["flops"] == pytest.approx(whole / (128 * one[128]))
    text = study_plan_text(study, state, cost)
    assert f"share of tuning: {tuning / whole:.1%} of FLOPs" in text
    assert "8 x 8 at width 16" in text
    assert "full sweep of 8 x 8 at width 128" in text
    # Runs that cannot be named yet are to be done too; the sweep at the target is not.
    whole += 128 * one[64]
    assert json.loads(plan_json(study, state, cost))["hours_left"] == pytest.approx(whole / 3.6e12)
    assert f"about {format_hours(whole / 3.6e12)} to go" in text


@pytest.mark.parametrize("rounds", [0, 1, 2, 99])
def test_what_has_ended_is_not_to_go(telescope: Make, rounds: int) -> None:
    study = telescope(extend=1)
    runs = ended(study, bowl(noise=0.001))
    outcomes = dict(runs) if rounds == 99 else ended(study, bowl(noise=0.001), rounds)
    wanted = index_runs(study.plan(outcomes))
    waiting = {
        id: Outcome(run, RunFolder(Path("nowhere")), "waiting")
        for id, run in wanted.items()
        if id not in outcomes
    }
    expected = tuple(study.expected(outcomes))
    state = StudyState(wanted, {**outcomes, **waiting}, expected)
    section = study.config.executor
    known = {**{part.example.id: part.example for part in expected}, **wanted}
    cost = estimate_cost(known, state.outcomes, section, measure=False)
    every = estimate_cost(
        {id: one.run for id, one in runs.items()}, runs, section, measure=False
    ).hours([id for id in runs if id not in outcomes])
    assert hours_left(state, cost) == pytest.approx(every, abs=1e-12)


def test_the_account_of_a_finished_study_has_its_seconds(telescope: Make) -> None:
    study = telescope(points=3, seeds=[0], extend=2)
    found = found_with(study, bowl(lr=0.08))
    lines = found["account"]["lines"]
    # 15 places after two lines were added; a run takes width / 16 seconds, whatever FLOP/s are said.
    assert [(line["runs"], line["most"], line["seconds"]) for line in lines[:2]] == [
        (15, 15, 1.0),
        (9, 9, 2.0),
    ]
    assert lines[-1]["seconds"] == 8.0


def test_the_plan_reaches_width_16384(telescope: Make) -> None:
    study = telescope(calibration_width=8192, target_width=16384, points=3)
    state, cost = plan_study(study)
    big = cost.runs[state.expected[-1].example.id]
    # Two layers of attention (half of keys and values) and a feed-forward of 44/16 widths.
    assert big.without_embeddings == pytest.approx(2 * 16384**2 * (3 + 3 * 44 / 16), rel=1e-3)
    assert len(state.runs) == 18


def test_a_full_sweep_is_the_judge(telescope: Make) -> None:
    study = telescope(full_sweep="calibration")
    good = bowl(lr=0.02 * 2**0.5, wd=0.1 * 2**0.5, noise=0.001)
    outcomes = ended(study, good)
    # 64 places of the full sweep, one of which is the middle of the last level.
    at_64 = [o for o in outcomes.values() if where(o.run)["width"] == 64]
    assert len(at_64) == 2 * (64 + 9 - 1)
    sweep = found_with(study, good)["full_sweep"]
    assert sweep["within_noise"] is True
    assert sweep["loss"] == pytest.approx(2 + 8 / 8 + 0.05, abs=0.005)
    assert sweep["missing"] == 0
    assert sweep["flops"][0] < 0.5 * sweep["flops"][1]
    assert sweep["passed"] is True
    assert sweep["seconds"] == [128 * 1 + 50 * 2 + 18 * 4, 128 * 4]


def test_a_full_sweep_can_be_at_the_target(telescope: Make) -> None:
    study = telescope(points=4, full_sweep="target", target_seeds=[5])
    good = bowl(lr=0.02 * 2**0.5, wd=0.1 * 2**0.5, noise=0.001)
    outcomes = ended(study, good)
    at = Counter(where(o.run)["width"] for o in outcomes.values())
    # The choice is a place of the sweep too, and has the seed of the target; at 64 it is alone.
    assert (at[64], at[128]) == (2, 2 * 16 + 1)
    sweep = found_with(study, good)["full_sweep"]
    assert (sweep["width"], sweep["missing"], sweep["passed"]) == (128, 0, True)
    assert sweep["telescoped"] == pytest.approx(2 + 8 / math.sqrt(128) + 0.05, abs=0.005)
    parts = Counter({e.part: e.runs for e in study.expected(outcomes)})
    assert (parts["check"], parts["instead"]) == (2 * 16, 0)

    def deceptive(run: PlannedRun) -> float:
        far = bowl(lr=0.02 / 2**1.5, wd=0.1 * 2**0.5, noise=0.001)(run) - 0.05
        near = good(run)
        return min(far, near) if where(run)["width"] == 128 else near

    sweep = found_with(study, deceptive)["full_sweep"]
    assert sweep["difference"] == pytest.approx(0.05, abs=0.004)
    assert (sweep["within_noise"], sweep["passed"]) == (False, False)


def test_a_choice_within_noise_passes(telescope: Make) -> None:
    # Between the places of the full sweep the loss is lower by 0.006, and 0.007 higher for another reason.
    def even(run: PlannedRun) -> float:
        c = where(run)
        offset = math.log2(c["lr"] / 0.02) - 0.5
        between = c["width"] == 64 and abs(offset - round(offset)) > 1e-3
        return bowl(noise=0.003)(run) + 0.007 * between

    sweep = found_with(telescope(full_sweep="calibration", least_points=3), even)["full_sweep"]
    assert sweep["best"] != {"lr": sweep["best"]["lr"], "wd": 0.1}
    assert sweep["low"] < 0 < sweep["high"]
    assert (sweep["within_noise"], sweep["passed"]) == (True, True)


def test_a_telescope_that_is_misled_fails(telescope: Make) -> None:
    # A second valley, far away, that only the wide model has.
    def deceptive(run: PlannedRun) -> float:
        far = bowl(lr=0.02 / 2**2.5, wd=0.1 * 2**0.5, noise=0.001)(run) - 0.05
        near = bowl(lr=0.02 * 2**0.5, wd=0.1 * 2**0.5, noise=0.001)(run)
        return min(far, near) if where(run)["width"] == 64 else near

    found = found_with(telescope(full_sweep="calibration"), deceptive)
    sweep = found["full_sweep"]
    assert sweep["best"]["lr"] == pytest.approx(0.02 / 2**2.5, rel=1e-4)
    assert sweep["difference"] == pytest.approx(0.05, abs=0.004)
    assert (sweep["within_noise"], sweep["passed"]) == (False, False)


def test_a_dear_telescope_fails(telescope: Make) -> None:
    # 3 x 3 points at every width are dearer than 3 x 3 at the last.
    study = telescope(points=3, full_sweep="calibration", least_points=3)
    sweep = found_with(study, bowl(lr=0.02, noise=0.001))["full_sweep"]
    assert (sweep["within_noise"], sweep["passed"]) == (True, False)


def test_a_report_has_surfaces_curves_and_marks(telescope: Make) -> None:
    study = telescope(full_sweep="calibration")
    outcomes = ended(study, bowl(slope=6, noise=0.001))
    state = StudyState({id: o.run for id, o in outcomes.items()}, outcomes)
    finished = {
        id: o for id, o in outcomes.items() if o.state != "finished"
    }  # there are no folders
    page = study.report(analyze_study(study, state), finished)
    charts = {b.name: b for s in page.sections for b in s.blocks if isinstance(b, Chart)}
    names = [b.name for s in page.sections for b in s.blocks if isinstance(b, Chart)]
    assert len(names) == len(charts) == 2 + 3 + 2 + 1
    surface = charts["surface-1-lr-wd"].surface
    assert surface is not None
    assert (len(surface.x), len(surface.y), len(surface.z), len(surface.z[0])) == (5, 5, 5, 5)
    for row, wd in zip(surface.z, surface.y, strict=True):
        for z, lr in zip(row, surface.x, strict=True):
            rows = [where(o.run) | {"loss": o.loss} for o in outcomes.values()]
            both = [r["loss"] for r in rows if (r["width"], r["lr"], r["wd"]) == (32, lr, wd)]
            assert z == pytest.approx(sum(both) / 2)
    series = {s.name: s for s in charts["u-curves-lr"].series}
    curve, lowest = series["width 16"], series["width 16, lowest"]
    assert len(curve.x) == 8
    assert lowest.y == (min(curve.y),)
    assert series.keys() >= {"width 32", "width 64"}
    assert len(charts["drift-lr"].series[0].x) == 3


def test_three_hyper_parameters_have_three_surfaces(telescope: Make) -> None:
    third = {"key": "optimizer.momentum", "center": 0.5, "ratio": 1.1}
    study = telescope(hyperparameters={"lr": LR, "wd": WD, "mu": third}, points=3, seeds=[0])
    outcomes = ended(study, bowl(lr=0.02), rounds=1)
    assert len(outcomes) == 27
    found = found_with(study, bowl(lr=0.02))
    assert found["chosen"] == {"lr": 0.02, "wd": 0.1, "mu": 0.5}
    page = study.report(found, {})
    names = [b.name for s in page.sections for b in s.blocks if isinstance(b, Chart)]
    assert [name for name in names if name.startswith("surface-0")] == [
        "surface-0-lr-wd",
        "surface-0-lr-mu",
        "surface-0-wd-mu",
    ]


def test_the_interval_of_a_ratio_holds_what_a_t_test_does_not_refuse() -> None:
    theta, half = np.array([0.5, 1.0, 2.0]), np.array([[2, 0, 0], [1, 1, 0], [0.3, -0.2, 1]])
    covariance, weights = 0.002 * half @ half.T, np.array([0.0, 1.0, 0.25])
    found = ratio_interval(weights, theta, covariance, 1.7)
    ratios = np.linspace(0, 12, 200_001)
    contrasts = weights - ratios[:, None] * np.array([1.0, 0, 0])
    errors = np.sqrt(np.einsum("ri,ij,rj->r", contrasts, covariance, contrasts))
    kept = ratios[np.abs(contrasts @ theta) <= 1.7 * errors]
    assert found.value == 3.0
    assert (found.low, found.high) == pytest.approx((kept[0], kept[-1]), abs=1e-3)
    assert math.isnan(ratio_interval(weights, theta, 50 * covariance, 1.7).low)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"calibration_width": 48}, "base_width=16"),
        ({"calibration_width": 8}, "base_width=16"),
        ({"target_width": 64}, "must be larger"),
        ({"hyperparameters": {}}, "at least 1"),
        ({"hyperparameters": {"seed": LR}}, "choose another name"),
        ({"hyperparameters": {"a": LR, "b": LR}}, "key=optimizer.lr"),
        ({"hyperparameters": {"lr": {**LR, "key": "lr"}}}, "form section.key"),
        ({"hyperparameters": {"n": {**LR, "key": "model.fields"}}}, "every width itself"),
        ({"hyperparameters": {"n": {**LR, "key": "run.seed"}}}, "every width itself"),
        ({"hyperparameters": {"lr": {**LR, "ratio": 1}}}, "greater than 1"),
        ({"set": {"optimizer.lr": 0.1}}, r"set\.optimizer\.lr"),
        ({"set": {"transfer.base": "demo"}}, r"set\.transfer\.base"),
        ({"points": 2}, "greater than or equal to 3"),
        ({"seeds": [1, 1]}, "repeat"),
        ({"least_points": 2}, "1 or 3"),
    ],
)
def test_wrong_telescopes_are_refused(telescope: Make, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        telescope(**keys)


def test_models_that_have_no_such_width_are_refused(telescope: Make) -> None:
    with pytest.raises(ConfigError, match="cannot have the width 24"):
        telescope(target_width=200, base_width=24, calibration_width=48).plan({})


def test_what_cannot_be_transferred_is_refused_before_anything_runs(
    telescope: Make, tiny_keys: dict[str, Any]
) -> None:
    keys = {**tiny_keys, "model.preset": "gemma-nano"}
    widths = {"base_width": 32, "calibration_width": 64, "target_width": 128, "grow": "head_dim"}
    with pytest.raises((ConfigError, StudyError), match="weight_decay"):
        telescope(set=keys, **widths).plan({})


def test_a_recipe_that_transfers_already_is_refused(telescope: Make, tmp_path: Path) -> None:
    from muonscale.lab.config.load import dump_config, load_config

    recipe = tmp_path / "base.json"
    base = load_config("demo", ["transfer.base={hidden_size: 64, num_attention_heads: 2}"])
    recipe.write_text(dump_config(base))
    with pytest.raises(ConfigError, match=r"base\.json has transfer\.base"):
        telescope(base=str(recipe)).plan({})


@pytest.fixture
def recipe(tiny_keys: dict[str, Any], tmp_path: Path) -> Callable[[float, float], str]:
    """Write a study of learning rates, three at width 16 and one at 32, by center and ratio."""

    def write(center: float, ratio: float) -> str:
        path = tmp_path / "mine.json"
        tree = {
            "study": "telescope",
            "path": str(tmp_path / "study"),
            "set": {**tiny_keys, "train.steps": 2},
            "hyperparameters": {"lr": {"key": "optimizer.lr", "center": center, "ratio": ratio}},
            "points": 3,
            "base_width": 16,
            "calibration_width": 32,
            "target_width": 48,
            "seeds": [0],
            "extend": 0,
            "full_sweep": "calibration",
            "executor": {"kind": "inline", "flops_per_second": 1e9},
        }
        path.write_text(json.dumps(tree), encoding="utf-8")
        return str(path)

    return write


def test_the_command_says_why_it_stopped(
    muonscale: Callable[..., Any], recipe: Callable[[float, float], str]
) -> None:
    # Two steps at these rates change next to nothing: the higher, the better.
    answer = muonscale("study", "run", recipe(1e-4, 3))
    assert answer.code == 1
    said = "stopped: width 16: the lowest loss is at the highest lr that was tried, 0.0003"
    assert said in answer.err


@pytest.mark.slow
def test_a_telescope_from_its_first_run_to_its_report(
    muonscale: Callable[..., Any], recipe: Callable[[float, float], str], tmp_path: Path
) -> None:
    words = ("study", "run", recipe(0.1, 100))
    answer = muonscale(*words)
    assert (answer.code, answer.err) == (0, "")
    study = tmp_path / "study"
    found = json.loads((study / "result.json").read_text())
    assert found["chosen"] == {"lr": 0.1}
    assert [level["shape"] for level in found["levels"]] == [[3], [1]]
    assert found["target"]["losses"]["0"] < 6
    # 3 + 1 + 1 runs, and of the full sweep those two that are not the telescope's.
    assert len(list((study / "runs").iterdir())) == 7
    assert "runs to do" not in muonscale(*words).out
    assert json.loads((study / "result.json").read_text()) == found
    assert (study / "report" / "report.html").exists()
