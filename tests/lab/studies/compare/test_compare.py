from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from muonscale.lab.estimate.run_cost import run_cost
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.studies.compare.config import CompareConfig
from muonscale.lab.studies.planned_run import PlannedRun
from muonscale.lab.studies.study import Outcome, Study
from muonscale.lab.studies.variants import VARIANTS

Make = Callable[..., Study]
Loss = Callable[[PlannedRun], float]


def ended(study: Study, loss: Loss) -> dict[str, Outcome]:
    """Return outcomes as if every run had ended with a loss, those of later plans included."""
    outcomes: dict[str, Outcome] = {}
    while len(runs := study.plan(outcomes)) > len(outcomes):
        for run in runs:
            value, folder = loss(run), RunFolder(Path("nowhere"))
            if math.isinf(value):
                outcomes[run.id] = Outcome(run, folder, "diverged", reason="inf")
            else:
                outcomes[run.id] = Outcome(run, folder, "finished", {"validation_loss": value})
    return outcomes


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """These outcomes have no folders to read a curve from."""
    monkeypatch.setattr("muonscale.lab.studies.compare.analysis.reach", lambda *_: {})


def where(run: PlannedRun) -> tuple[str, float, int]:
    c = run.coordinates
    return str(c["variant"]), float(c["lr"]), int(c["seed"])


def test_every_variant_has_every_learning_rate_and_seed(compare: Make) -> None:
    runs = compare(lr_of={"adamw": [0.001, 0.002]}).plan({})
    assert [where(run) for run in runs] == [
        *[("adamw", lr, seed) for lr in (0.001, 0.002) for seed in (0, 1)],
        *[("muon", lr, seed) for lr in (0.005, 0.02) for seed in (0, 1)],
    ]
    for run in runs:
        variant, lr, seed = where(run)
        assert run.config.optimizer.rule == variant
        assert run.config.optimizer.lr == lr
        assert run.config.run.seed == seed


def test_axes_multiply(compare: Make) -> None:
    study = compare(
        axes={
            "architecture": ["llama", "gpt2"],
            "length": {"a": {"train.steps": 3}, "b": {"train.steps": 4}},
        }
    )
    runs = study.plan({})
    assert len(runs) == 2 * 2 * 8
    assert {(r.config.model.preset, r.config.steps) for r in runs} == {
        (preset, steps) for preset in ("llama-nano", "gpt-nano") for steps in (3, 4)
    }


def test_tokens_per_parameter_set_the_length(compare: Make, tiny_keys: dict[str, Any]) -> None:
    keys = {k: v for k, v in tiny_keys.items() if k != "train.steps"}
    runs = compare(set=keys, tokens_per_parameter=[0.5, 2]).plan({})
    cost = run_cost(runs[0].config)
    assert {run.config.train.tokens for run in runs} == {
        math.ceil(0.5 * cost.parameters),
        2 * cost.parameters,
    }


def test_confirming_runs_come_when_the_tuning_has_ended(compare: Make) -> None:
    study = compare(confirm_seeds=[7])
    first = study.plan({})
    outcomes = ended(study, lambda run: abs(math.log(run.config.optimizer.lr / 0.02)))
    later = [run for run in study.plan(outcomes) if run.id not in {r.id for r in first}]
    assert [where(run) for run in later] == [("adamw", 0.02, 7), ("muon", 0.02, 7)]
    some = {id: outcome for id, outcome in outcomes.items() if outcome.run.id != first[0].id}
    assert ("adamw", 0.02, 7) not in [where(run) for run in study.plan(some)]


def noisy(run: PlannedRun) -> float:
    variant, lr, seed = where(run)
    noise = 0.001 * math.sin(100 * lr + 7 * seed + len(variant))
    return 3.0 + abs(math.log(lr / 0.02)) + 0.3 * seed + noise - 0.1 * (variant == "muon")


def test_a_difference_beyond_the_noise_is_found(compare: Make) -> None:
    study = compare(lr=[0.01, 0.02, 0.04])
    found = study.analyze(ended(study, noisy))["places"][0]
    (only,) = found["comparisons"]
    assert (only["better"], only["worse"]) == ("muon", "adamw")
    assert only["difference"] == pytest.approx(-0.1, abs=0.003)
    assert only["low"] < -0.1 < only["high"] < 0
    assert only["verdict"] in ("better", "likely better")
    assert [(v["best_lr"], v["edge"]) for v in found["variants"]] == [(0.02, None), (0.02, None)]


def test_equal_optimizers_are_not_significantly_different(compare: Make) -> None:
    study = compare(lr=[0.01, 0.02, 0.04])

    def equal(run: PlannedRun) -> float:
        return noisy(run) + 0.1 * (where(run)[0] == "muon")

    (only,) = study.analyze(ended(study, equal))["places"][0]["comparisons"]
    assert only["verdict"] == "not significantly different"


def test_only_confirming_runs_are_compared(compare: Make) -> None:
    study = compare(confirm_seeds=[5, 6])

    def lucky(run: PlannedRun) -> float:
        variant, _, seed = where(run)
        chosen = seed in (5, 6)
        return noisy(run) + (0.5 if chosen and variant == "muon" else 0.0)

    found = study.analyze(ended(study, lucky))["places"][0]
    assert found["comparisons"][0]["better"] == "adamw"


def test_diverged_runs_are_points_and_no_losses(compare: Make) -> None:
    study = compare(lr=[0.01, 0.02, 0.04])

    def hot(run: PlannedRun) -> float:
        return math.inf if where(run)[:2] == ("muon", 0.04) else noisy(run)

    muon = study.analyze(ended(study, hot))["places"][0]["variants"][1]
    assert muon["points"][2]["diverged"] == 2
    assert muon["best_lr"] == 0.02
    assert muon["edge"] is None


def test_an_optimum_at_the_edge_is_flagged(compare: Make) -> None:
    study = compare(lr=[0.04, 0.08, 0.16])
    found = study.analyze(ended(study, noisy))["places"][0]
    assert {v["edge"] for v in found["variants"]} == {"low"}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_known_variant_is_a_configuration_of_its_own(compare: Make, name: str) -> None:
    run = compare(variants={name: {}}, baselines=[name], lr=[0.01], seeds=[0]).plan({})[0]
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
        ({"lr": [0.2, 0.1]}, "must rise"),
        ({"lr_of": {"adamw": [0.1]}}, "equal effort"),
        ({"lr_of": {"adam": [0.1, 0.2]}}, "no variant 'adam'"),
        ({"seeds": [0, 0]}, "repeat"),
        ({"confirm_seeds": [0]}, "repeat"),
        ({"axes": {"corpus": ["french"]}}, "french"),
        ({"axes": 3}, "must map names of axes"),
        ({"seeds": []}, "at least 1"),
    ],
)
def test_wrong_studies_are_refused(keys: dict[str, Any], said: str) -> None:
    given = {"path": "x", "variants": ["adamw", "muon"], "baselines": ["muon"], "lr": [0.1, 0.2]}
    with pytest.raises(ValidationError, match=said):
        CompareConfig.model_validate(given | keys)
