from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from muonscale.lab.estimate.run_cost import run_cost
from muonscale.lab.files import drop_nonfinite
from muonscale.lab.studies.analysis.curves import LossCurve
from muonscale.lab.studies.compare.config import CompareConfig
from muonscale.lab.studies.planned_run import PlannedRun
from muonscale.lab.studies.study import Outcome, Study
from muonscale.lab.studies.variants import VARIANTS
from tests.lab.studies.conftest import end_all, end_with, search

Make = Callable[..., Study]
Loss = Callable[[PlannedRun], float]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """These outcomes have no folders to read a curve from."""
    monkeypatch.setattr("muonscale.lab.studies.compare.analysis.reach", lambda *_: {})
    monkeypatch.setattr("muonscale.lab.studies.compare.lengths.read_curve", made_curve)


def made_curve(outcome: Outcome) -> LossCurve:
    """Return a curve of one evaluation, at the end of a run."""
    config = outcome.run.config
    tokens = float(config.timeline.tokens_before(config.steps))
    flops = tokens * (1.5 if outcome.run.coordinates["variant"] == "muon" else 1.0)
    spent = {"tokens": np.array([tokens]), "flops": np.array([flops])}
    return LossCurve(loss=np.array([outcome.loss]), spent=spent)


def ended(study: Study, loss: Loss) -> dict[str, Outcome]:
    """Return outcomes as if every run had ended with a loss, those of later plans included."""
    return end_all(study, end_with(loss))


def where(run: PlannedRun) -> tuple[str, float, int]:
    c = run.coordinates
    return str(c["variant"]), float(c["lr"]), int(c["seed"])


def test_the_best_settings_are_run_with_every_seed(compare: Make) -> None:
    study = compare(seeds=[0, 7])
    outcomes = ended(study, noisy)
    searched = [where(run) for run in study.plan({})]
    assert searched == [("adamw", 0.02, 0), ("muon", 0.02, 0)]
    assert sorted(where(o.run) for o in outcomes.values()) == sorted(
        (variant, lr, seed)
        for variant in ("adamw", "muon")
        for lr, seed in ((0.01, 0), (0.02, 0), (0.04, 0), (0.02, 7))
    )
    for outcome in outcomes.values():
        variant, lr, seed = where(outcome.run)
        config = outcome.run.config
        assert (config.optimizer.rule, config.optimizer.lr, config.run.seed) == (variant, lr, seed)


def test_axes_multiply(compare: Make) -> None:
    study = compare(
        axes={
            "architecture": ["llama", "gpt2"],
            "length": {"a": {"train.steps": 3}, "b": {"train.steps": 4}},
        }
    )
    runs = [outcome.run for outcome in ended(study, noisy).values()]
    assert len(runs) == 2 * 2 * 8
    assert {(r.config.model.preset, r.config.steps) for r in runs} == {
        (preset, steps) for preset in ("llama-nano", "gpt-nano") for steps in (3, 4)
    }


def test_tokens_per_parameter_set_the_length(compare: Make, tiny_keys: dict[str, Any]) -> None:
    keys = {k: v for k, v in tiny_keys.items() if k != "train.steps"}
    runs = compare(set=keys, tokens_per_parameter=[0.5, 2], search=search(begin="start")).plan({})
    cost = run_cost(runs[0].config)
    assert {run.config.train.tokens for run in runs} == {
        math.ceil(0.5 * cost.parameters),
        2 * cost.parameters,
    }


def test_compared_runs_come_when_all_searches_have_ended(compare: Make) -> None:
    study = compare(seeds=[7])
    outcomes = ended(study, noisy)
    last = [where(run) for run in study.plan(outcomes)][-1]
    assert last == ("muon", 0.02, 7)
    some = {i: o for i, o in outcomes.items() if where(o.run) != ("muon", 0.04, 0)}
    assert 7 not in [where(run)[2] for run in study.plan(some)]


def noisy(run: PlannedRun) -> float:
    variant, lr, seed = where(run)
    noise = 0.001 * math.sin(100 * lr + 7 * seed + len(variant))
    return 3.0 + abs(math.log(lr / 0.02)) + 0.3 * seed + noise - 0.1 * (variant == "muon")


def test_a_difference_beyond_the_noise_is_found(compare: Make) -> None:
    study = compare()
    found = study.analyze(ended(study, noisy))["places"][0]
    (only,) = found["comparisons"]
    assert (only["better"], only["worse"]) == ("muon", "adamw")
    assert only["difference"] == pytest.approx(-0.1, abs=0.003)
    assert only["low"] < -0.1 < only["high"] < 0
    assert only["verdict"] in ("better", "likely better")
    for variant in found["variants"]:
        assert (variant["best"], variant["tuned"], variant["edges"]) == ({"lr": 0.02}, True, [])


def test_equal_optimizers_are_not_significantly_different(compare: Make) -> None:
    study = compare()

    def equal(run: PlannedRun) -> float:
        return noisy(run) + 0.1 * (where(run)[0] == "muon")

    (only,) = study.analyze(ended(study, equal))["places"][0]["comparisons"]
    assert only["verdict"] == "not significantly different"


def test_only_runs_with_the_seeds_of_the_study_are_compared(compare: Make) -> None:
    study = compare(seeds=[5, 6])

    def lucky(run: PlannedRun) -> float:
        variant, _, seed = where(run)
        chosen = seed in (5, 6)
        return noisy(run) + (0.5 if chosen and variant == "muon" else 0.0)

    found = study.analyze(ended(study, lucky))["places"][0]
    assert found["comparisons"][0]["better"] == "adamw"


def test_diverged_runs_are_points_and_no_losses(compare: Make) -> None:
    study = compare()

    def hot(run: PlannedRun) -> float:
        return math.inf if where(run)[:2] == ("muon", 0.04) else noisy(run)

    muon = study.analyze(ended(study, hot))["places"][0]["variants"][1]
    assert [point["diverged"] for point in muon["points"]] == [0, 0, 1]
    assert (muon["best"], muon["tuned"]) == ({"lr": 0.02}, True)


def test_there_is_no_verdict_where_one_is_not_tuned(compare: Make) -> None:
    section = search(most=3)
    section["keys"]["lr"]["start_of"] = {"adamw": 0.08}
    study = compare(search=section)
    outcomes = ended(study, noisy)
    found = study.analyze(outcomes)
    (place,) = found["places"]
    adamw, muon = place["variants"]
    assert (adamw["best"], adamw["tuned"], adamw["edges"]) == ({"lr": 0.04}, False, ["lr low"])
    assert muon["tuned"]
    (only,) = place["comparisons"]
    assert (only["better"], only["verdict"]) == ("muon", "not tuned")
    page = study.report(drop_nonfinite(found), {})
    assert [verdict.passed for verdict in page.verdicts] == [None]
    assert "search.most" in str(page)


def test_a_search_without_a_finite_loss_stops_the_study(compare: Make) -> None:
    study = compare()
    outcomes = ended(study, lambda run: math.inf if where(run)[0] == "muon" else noisy(run))
    found = study.analyze(outcomes)
    assert "muon" in found["stopped"]
    assert len(outcomes) == 2 * 6 + 1  # AdamW has 6 settings too, and a second seed
    page = study.report(drop_nonfinite(found), {})
    assert page.verdicts[0].passed is False


def lengths(muon: float, compare: Make, keys: dict[str, Any], noise: float = 0) -> dict[str, Any]:
    """Return the findings about losses 9 D^-0.1, D times `muon` for Muon, at D of three lengths."""

    def law(run: PlannedRun) -> float:
        variant, lr, seed = where(run)
        tokens = run.config.timeline.tokens_before(run.config.steps)
        factor = muon * math.exp(noise * seed) if variant == "muon" else 1.0
        return 9 * (tokens * factor) ** -0.1 + 0.1 * abs(math.log(lr / 0.02))

    own = {k: v for k, v in keys.items() if k != "train.steps"}
    study = compare(set=own, tokens_per_parameter=[0.5, 1, 4], search=search(at="first"))
    return study.analyze(ended(study, law))


def test_cost_to_equal_loss_by_whole_runs(compare: Make, tiny_keys: dict[str, Any]) -> None:
    rows = lengths(1.25, compare, tiny_keys)["lengths"]
    assert [(r["place"]["tokens_per_parameter"], r["measure"]) for r in rows] == [
        (length, measure) for measure in ("tokens", "flops") for length in (0.5, 1, 4)
    ]
    for row in rows:
        assert (row["variant"], row["baseline"], row["tuned"]) == ("muon", "adamw", True)
        if row["place"]["tokens_per_parameter"] == 0.5:
            assert (row["censored"], row["ratio"]) == ("<", pytest.approx(math.nan, nan_ok=True))
            continue
        # A law is a straight line in logarithms, so its interpolation is exact.
        flops = 1.5 if row["measure"] == "flops" else 1.0
        assert row["ratio"] == pytest.approx(flops / 1.25, rel=1e-6)
        assert row["low"] == pytest.approx(row["ratio"]) == pytest.approx(row["high"])


def test_a_ratio_over_lengths_has_the_interval_of_its_seeds(
    compare: Make, tiny_keys: dict[str, Any]
) -> None:
    (row,) = [
        r
        for r in lengths(1.25, compare, tiny_keys, noise=0.04)["lengths"]
        if (r["measure"], r["place"]["tokens_per_parameter"]) == ("tokens", 1)
    ]
    # Logarithms of the ratio are -log 1.25 and that minus 0.04; Student's quantile with 1 is 6.314.
    assert row["ratio"] == pytest.approx(math.exp(-0.02) / 1.25, rel=1e-6)
    half = 6.3138 * 0.04 / math.sqrt(2) / math.sqrt(2)
    assert math.log(row["high"] / row["ratio"]) == pytest.approx(half, rel=1e-4)
    assert math.log(row["ratio"] / row["low"]) == pytest.approx(half, rel=1e-4)


def test_a_loss_beyond_the_longest_run_has_no_ratio(
    compare: Make, tiny_keys: dict[str, Any]
) -> None:
    found = lengths(0.5, compare, tiny_keys)
    last = [r for r in found["lengths"] if r["place"]["tokens_per_parameter"] == 4]
    assert {r["censored"] for r in last} == {">"}
    assert len(found["places"]) == 3


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_known_variant_is_a_configuration_of_its_own(compare: Make, name: str) -> None:
    run = compare(variants={name: {}}, baselines=[name]).plan({})[0]
    assert run.config.optimizer.rule == ("adamw" if name == "adamw" else "muon")
    if name == "muon-one-factor":  # the factor of a hidden_size x hidden_size matrix
        assert run.config.optimizer.scale == pytest.approx(0.2 * math.sqrt(32))
    if name == "muon-rms-0.4":
        assert run.config.optimizer.rms == 0.4
    if name == "muon-no-wd":
        assert run.config.optimizer.weight_decay == 0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"baselines": ["muom"]}, "did you mean muon"),
        ({"variants": ["muom"]}, "'muom'"),
        ({"variants": {"mine": {"lr": 1}}}, "not a key of a recipe"),
        ({"seeds": [0, 0]}, "repeat"),
        ({"search": {"keys": {}}}, "at least 1"),
        ({"axes": {"corpus": ["french"]}}, "french"),
        ({"axes": 3}, "must map names of axes"),
        ({"seeds": []}, "at least 1"),
    ],
)
def test_wrong_studies_are_refused(keys: dict[str, Any], said: str) -> None:
    given = {"path": "x", "variants": ["adamw", "muon"], "baselines": ["muon"], "search": search()}
    with pytest.raises(ValidationError, match=said):
        CompareConfig.model_validate(given | keys)
