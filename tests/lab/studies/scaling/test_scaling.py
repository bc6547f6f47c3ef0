from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from muonscale.lab.estimate.run_cost import run_cost
from muonscale.lab.files import drop_nonfinite
from muonscale.lab.report.write import write_page
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.studies.engine import plan_study, run_study
from muonscale.lab.studies.planned_run import PlannedRun, index_runs
from muonscale.lab.studies.scaling.analysis import PFLOPS_DAY, paper_ratio
from muonscale.lab.studies.scaling.config import ScalingConfig
from muonscale.lab.studies.scaling.study import ScalingStudy
from muonscale.lab.studies.study import Outcome
from muonscale.lab.training.dry_run import planned_shape
from muonscale.lab.training.param_groups import plan_transfer
from tests.lab.studies.conftest import cost_once, search

Loss = Callable[[PlannedRun], float]
LADDER = [
    {"width": 32, "layers": 1, "tokens": 4096, "other_tokens": [2048, 8192]},
    {"width": 64, "layers": 1, "tokens": 8192, "other_tokens": [4096]},
    {"width": 96, "layers": 2, "tokens": 16384, "other_tokens": [32768]},
    {"width": 128, "layers": 3, "tokens": 32768},
]
SINGLE = [{key: rung[key] for key in ("width", "layers", "tokens")} for rung in LADDER]


@pytest.fixture
def study(tiny_keys: dict[str, Any], tmp_path: Path) -> Callable[..., ScalingStudy]:
    def make(**keys: Any) -> ScalingStudy:
        given = {
            "path": tmp_path / "study",
            "set": {**tiny_keys, "model.preset": "llama-nano"},
            "variants": ["adamw", "muon"],
            "ladder": SINGLE,
            "lr": 0.02,
            "resamples": 100,
            "executor": {"kind": "inline"},
        }
        return ScalingStudy(ScalingConfig.model_validate(given | keys))

    return make


ENV = {"versions": {"torch": "2"}, "device_name": "x", "threads": 1}


def outcomes_of(study: ScalingStudy, loss: Loss) -> dict[str, Outcome]:
    """End all runs that the study comes to want with a loss of theirs; infinite ones diverge."""
    folder = RunFolder(study.config.path)
    folder.path.mkdir(exist_ok=True)
    (folder.path / "env.json").write_text(json.dumps(ENV))
    outcomes: dict[str, Outcome] = {}
    while set(runs := index_runs(study.plan(outcomes))) - set(outcomes):
        for id, run in runs.items():
            value = loss(run)
            state = "finished" if math.isfinite(value) else "diverged"
            result = (
                {"validation_loss": value, "train_seconds": 1} if math.isfinite(value) else None
            )
            outcomes[id] = Outcome(run, folder, state, result)
    return {id: outcomes[id] for id in runs}


def power(laws: dict[str, tuple[float, float]], noise: float = 0.0) -> Loss:
    """Return losses a C^-b of the counted operations, by optimizer."""

    def loss(run: PlannedRun) -> float:
        a, b = laws[str(run.coordinates["variant"])]
        flops, seed = cost_once(run.config).flops, int(run.coordinates["seed"])
        return a * flops**-b * math.exp(noise * math.sin(97 * seed + 1e-6 * flops))

    return loss


def test_a_rung_has_its_size_length_and_settings(study: Callable[..., ScalingStudy]) -> None:
    ladder = [{**LADDER[0], "set": {"optimizer.momentum": 0.9}}, *LADDER[1:]]
    given = study(
        ladder=ladder,
        lr={"coefficient": 0.5, "exponent": -0.1},
        lr_of={"adamw": 0.004},
        batch={"coefficient": 0.01, "exponent": 0.5},
        transfer="spectral",
    )
    runs = list(index_runs(given.plan({})).values())
    assert len(runs) == 2 * 2 * (4 + 2 + 1 + 1)
    for run in runs:
        width, layers = map(int, str(run.coordinates["rung"]).split("x"))
        shape = planned_shape(run.config)
        assert (shape.hidden_size, shape.num_hidden_layers) == (width, layers)
        assert shape.hidden_size // shape.num_attention_heads == 32  # llama-nano's heads
        assert run.config.optimizer.momentum == (0.9 if width == 32 else 0.95)
        n, d = run_cost(run.config).without_embeddings, int(run.coordinates["tokens"])
        c = 6 * n * d
        adamw = run.coordinates["variant"] == "adamw"
        assert run.config.optimizer.lr == pytest.approx(0.004 if adamw else 0.5 * c**-0.1)
        batch = run.config.train.batch_tokens
        assert batch % 32 == 0
        assert abs(batch - 0.01 * c**0.5) <= 16 or batch == 32
        assert run.config.train.tokens == d
        transfer = plan_transfer(run.config, shape)
        if width == 32:
            assert transfer is None
        else:
            assert transfer is not None
            assert transfer.convention == "spectral"


def valley(run: PlannedRun) -> float:
    """Return losses that are lowest at a rate that rises with the width."""
    width = int(str(run.coordinates["rung"]).split("x")[0])
    best = 0.01 * (width / 32) ** 0.5
    return 4 - 0.1 * math.log(width) + 0.1 * math.log(run.config.optimizer.lr / best) ** 2


def test_settings_are_searched_on_every_rung_then_measured(
    study: Callable[..., ScalingStudy],
) -> None:
    given = study(
        variants=["adamw"],
        ladder=LADDER,
        lr=None,
        search=search(0.01, seeds=[7]),
        seeds=[0, 1],
    )
    (first,) = index_runs(given.plan({})).values()
    assert (first.coordinates["rung"], first.config.optimizer.lr) == ("32x1", 0.01)
    outcomes = outcomes_of(given, valley)
    chosen = {
        (run.run.coordinates["rung"], run.run.config.optimizer.lr)
        for run in outcomes.values()
        if run.run.coordinates["seed"] == 0
    }
    # The best are 0.01, 0.0141, 0.0173 and 0.02: the second lies between two, nearer neither.
    assert {lr for rung, lr in chosen if rung == "32x1"} == {0.01}
    assert {lr for rung, lr in chosen if rung == "128x3"} == {0.02}
    # Three settings on a rung, one more where the best is not the one that its search begins at.
    searched = [o.run for o in outcomes.values() if o.run.coordinates["seed"] == 7]
    assert [sum(r.coordinates["rung"] == name for r in searched) for name in given.names] == [
        *(3, 3, 4, 3)
    ]
    assert len(outcomes) == 13 + 2 * (3 + 2 + 2 + 1)
    rows = given.analyze(outcomes)["rungs"]
    assert [row["edges"] for row in rows if row["main"]] == [[], [], [], []]
    assert all(row["tuned"] for row in rows)


def test_the_first_rung_can_choose_for_all(study: Callable[..., ScalingStudy]) -> None:
    own = {key: x for key, x in study().config.set.items() if key != "train.batch_tokens"}
    given = study(
        set=own,
        variants=["adamw"],
        ladder=LADDER,
        lr=None,
        search={
            "keys": {
                "lr": {"key": "optimizer.lr", "start": 0.01},
                "step_tokens": {"key": "train.batch_tokens", "start": 256},
            },
            "settings": 4,
            "most": 4,
            "at": "first",
        },
        seeds=[3],
    )
    assert len(index_runs(given.plan({}))) == 1
    outcomes = outcomes_of(given, lambda run: valley(run) + 1e-4 * run.config.train.batch_tokens)
    later = [o.run.config for o in outcomes.values() if o.run.coordinates["rung"] != "32x1"]
    assert {(c.optimizer.lr, c.train.batch_tokens) for c in later} == {(0.01, 128)}
    assert len(later) == 2 + 2 + 1
    (row, *_) = given.analyze(outcomes)["rungs"]
    assert (row["edges"], row["tuned"]) == (["lr low", "lr high", "step_tokens low"], False)


def test_laws_and_ratio_are_those_that_made_the_losses(
    study: Callable[..., ScalingStudy], tmp_path: Path
) -> None:
    laws = {"adamw": (9.0, 0.05), "muon": (8.4, 0.048)}
    given = study()
    outcomes = outcomes_of(given, power(laws))
    found = given.analyze(outcomes)
    for fit in found["compute"]["counted"]["fits"]:
        a, b = (value["value"] for value in fit["estimates"][:2])
        assert (a, b) == pytest.approx(laws[fit["name"]], rel=1e-6)
    (ratio,) = found["ratios"]
    for row in ratio["rows"]:
        loss = 9.0 * row["flops"] ** -0.05
        reached = (8.4 / loss) ** (1 / 0.048)
        assert row["ratio"] == pytest.approx(reached / row["flops"], rel=1e-6)
    assert ratio["trend"]["value"] == pytest.approx(0.05 / 0.048 - 1, rel=1e-5)
    page = given.report(drop_nonfinite(found), outcomes)
    assert write_page(page, tmp_path / "report").exists()
    claims = [block for block in page.sections[0].blocks if hasattr(block, "passed")]
    assert [claim.passed for claim in claims] == [True, False, True]
    assert {"flops-ratio", "flops-ratio-paper", "compute-fit"} <= {c.name for c in page.charts}
    assert len({chart.name for chart in page.charts}) == len(page.charts)


def test_what_the_runs_of_a_seed_share_is_taken_out(study: Callable[..., ScalingStudy]) -> None:
    laws = {"adamw": (9.0, 0.05), "muon": (8.4, 0.048)}
    luck = {0: 0.97, 1: 1.03, 2: 1 / (0.97 * 1.03)}
    given = study(seeds=[0, 1, 2])
    outcomes = outcomes_of(given, lambda run: power(laws)(run) * luck[int(run.coordinates["seed"])])
    found = given.analyze(outcomes)
    for fit in found["compute"]["counted"]["fits"]:
        a, b = (value["value"] for value in fit["estimates"][:2])
        assert (a, b) == pytest.approx(laws[fit["name"]], rel=1e-6)
        assert fit["rms"] < 1e-9
    for seed, effect in found["seed_effects"].items():
        assert effect == pytest.approx(math.log(luck[int(seed)]))
    assert found["rungs"][0]["losses"]["0"] == next(iter(outcomes.values())).loss


def test_a_law_of_parameters_and_tokens_by_both_counts(study: Callable[..., ScalingStudy]) -> None:
    def loss(run: PlannedRun) -> float:
        cost = cost_once(run.config)
        return 1.5 + 9 * cost.parameters**-0.3 + 40 * cost.tokens**-0.4

    given = study(ladder=LADDER)
    found = given.analyze(outcomes_of(given, loss))["chinchilla"]
    fit, _ = found["with-embeddings"]["fits"]
    values = {value["name"]: value["value"] for value in fit["estimates"]}
    assert values["E"] == pytest.approx(1.5, rel=1e-3)
    assert values["alpha"] == pytest.approx(0.3, rel=1e-3)
    assert values["beta"] == pytest.approx(0.4, rel=1e-3)
    other, _ = found["without-embeddings"]["fits"]
    assert other["estimates"][3]["value"] != pytest.approx(0.3, rel=1e-2)


def test_one_length_each_tells_no_law_of_both(study: Callable[..., ScalingStudy]) -> None:
    given = study()
    outcomes = outcomes_of(given, power({"adamw": (9, 0.05), "muon": (8, 0.05)}))
    found = given.analyze(outcomes)
    assert "other_tokens" in found["chinchilla"]["with-embeddings"]["why"]
    given.report(drop_nonfinite(found), outcomes)


@pytest.mark.parametrize(
    ("muon", "verdicts"),
    [
        ((8.0, 0.05), [True, False]),
        ((9 * 0.519**0.05, 0.05), [True, True]),
        ((9.02, 0.05), [None, False]),
        ((10.0, 0.05), [False, False]),
    ],
)
def test_verdicts_of_either_sign(
    study: Callable[..., ScalingStudy], muon: tuple[float, float], verdicts: list[bool | None]
) -> None:
    given = study()
    outcomes = outcomes_of(given, power({"adamw": (9.0, 0.05), "muon": muon}, noise=0.004))
    page = given.report(drop_nonfinite(given.analyze(outcomes)), outcomes)
    claims = [block for block in page.sections[0].blocks if hasattr(block, "passed")]
    assert [claim.passed for claim in claims[:2]] == verdicts


def test_operations_hold_newton_schulz(study: Callable[..., ScalingStudy]) -> None:
    outcomes = outcomes_of(study(), power({"adamw": (9, 0.05), "muon": (8, 0.05)}))
    rows = study().analyze(outcomes)["rungs"]
    adamw, muon = (
        next(r for r in rows if r["variant"] == name and r["rung"] == "128x3")
        for name in ("adamw", "muon")
    )
    assert adamw["newton_schulz"] == 0
    # Per layer four square matrices and three of 128 x 352: at most 5 steps of 4 s^2 l + 2 s^3, of
    # which products that are symmetric, and the Gram form, save a part.
    inner = planned_shape(study().plan({})[-1].config).intermediate_size
    sides = [(128, 128)] * 4 + [(128, inner)] * 3
    most = 3 * muon["steps"] * sum(5 * (4 * s * s * n + 2 * s**3) for s, n in sides)
    extra = muon["flops"] - adamw["flops"]
    assert 0.6 * most < extra < most
    assert muon["newton_schulz"] == pytest.approx(extra / muon["flops"])


def test_a_rung_where_everything_diverges_stops_it(
    study: Callable[..., ScalingStudy], tmp_path: Path
) -> None:
    given = study(lr=None, search=search(0.02))
    outcomes = outcomes_of(
        given, lambda run: math.inf if run.coordinates["rung"] == "96x2" else 3.0
    )
    found = given.analyze(outcomes)
    assert "adamw" in found["stopped"]
    assert not [row for row in found["rungs"] if row["rung"] == "96x2"]
    write_page(given.report(drop_nonfinite(found), outcomes), tmp_path / "report")


def test_nothing_run_yet_is_a_page(study: Callable[..., ScalingStudy], tmp_path: Path) -> None:
    given = study(lr=None, search=search(0.02))
    write_page(given.report(drop_nonfinite(given.analyze({})), {}), tmp_path / "report")


def test_there_is_no_verdict_where_a_rung_is_not_tuned(
    study: Callable[..., ScalingStudy], tmp_path: Path
) -> None:
    section = search(0.04, begin="start", most=3)
    section["keys"]["lr"]["start_of"] = {"adamw": 0.02}
    given = study(lr=None, search=section)
    laws = power({"adamw": (9.0, 0.05), "muon": (8.0, 0.05)})

    def loss(run: PlannedRun) -> float:
        best = 0.01 if run.coordinates["rung"] == "64x1" else 0.02
        if run.coordinates["variant"] == "muon":
            best *= 2
        return laws(run) + 0.1 * abs(math.log(run.config.optimizer.lr / best))

    outcomes = outcomes_of(given, loss)
    found = given.analyze(outcomes)
    (ratio,) = found["ratios"]
    assert ratio["not_tuned"] == ["adamw 64x1", "muon 64x1"]
    page = given.report(drop_nonfinite(found), outcomes)
    (verdict,) = (block for block in page.sections[0].blocks if hasattr(block, "passed"))
    assert verdict.passed is None and "not tuned" in verdict.text
    assert write_page(page, tmp_path / "report").exists()


@pytest.mark.parametrize("at", ["every", "first"])
def test_all_runs_are_counted_before_the_searches_end(
    study: Callable[..., ScalingStudy], at: str
) -> None:
    section = search(0.01, settings=4, at=at)
    given = study(ladder=LADDER, lr=None, search=section, seeds=[0, 1])
    state, cost = plan_study(given, measure=False)
    whole = sum(part.runs for part in state.expected)
    assert whole == len(outcomes_of(given, valley))
    assert cost.total(state.runs)[0] == 2


@pytest.mark.parametrize(("days", "ratio"), [(1, 0.464), (5, 0.494), (20, 0.521)])
def test_moonlight_ratio_by_its_rounded_laws(days: float, ratio: float) -> None:
    assert paper_ratio(days * PFLOPS_DAY) == pytest.approx(ratio, abs=0.003)


@pytest.mark.slow
def test_a_small_ladder_is_trained(
    study: Callable[..., ScalingStudy], tiny_keys: dict[str, Any]
) -> None:
    ladder = [{"width": w, "tokens": t} for w, t in ((32, 512), (64, 1024), (96, 2048))]
    given = study(
        set={**tiny_keys, "eval.every": 100},
        ladder=ladder,
        seeds=[0],
        lr=None,
        search=search(0.02, settings=2, most=2),
    )
    found = run_study(given, lambda line: None)
    assert (found["runs"], found["missing"], found["failed"]) == (12, 0, [])
    assert [row["rung"] for row in found["rungs"]] == ["32", "64", "96"] * 2
    assert all(np.isfinite(list(row["losses"].values())).all() for row in found["rungs"])
    fits = found["compute"]["counted"]["fits"]
    assert [fit["runs"] for fit in fits] == [3, 3]
    assert "at least 4 points" in fits[0]["without_intervals"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"baseline": "sgd"}, "baseline: no variant 'sgd'"),
        ({"ladder": LADDER[:2]}, "at least 3"),
        ({"ladder": [*LADDER, LADDER[0]]}, "two rungs are the same size"),
        ({"ladder": [{**LADDER[0], "other_tokens": [4096]}, *LADDER[1:]]}, "repeats 4096"),
        ({"ladder": [{"width": 32}, *LADDER[1:]]}, "tokens"),
        ({"lr": [0.01, 0.02]}, "lr=.0.01, 0.02. must be a number .* `search` is for"),
        ({"search": search()}, "lr: search.keys has optimizer.lr too; leave one out"),
        ({"lr": None, "lr_of": {"muon": 0.1}, "search": search()}, "lr: search.keys has"),
        (
            {
                "lr": None,
                "search": search(),
                "ladder": [{**LADDER[0], "set": {"optimizer.lr": 1}}, *LADDER[1:]],
            },
            "ladder.0.set has optimizer.lr",
        ),
        ({"lr_of": {"muon+": 0.1}}, "no variant 'muon"),
        ({"batch_of": {"sgd": 256}}, "no variant 'sgd'"),
        ({"lr": {"coefficient": 0.1}}, "lr={.coefficient.: 0.1} must be"),
        ({"lr": -0.1}, "lr=-0.1 must be"),
        ({"lr_of": {"muon": "fast"}}, "lr_of='fast' must be"),
        ({"batch": 0}, "batch=0 must be"),
        ({"transfer": "mup"}, "spectral"),
        ({"seeds": [0, 0]}, "seeds=.0, 0. repeats 0"),
        ({"search": search(at="last")}, "first"),
    ],
)
def test_wrong_studies_are_refused(keys: dict[str, Any], said: str) -> None:
    given = {"path": "x", "variants": ["adamw", "muon"], "ladder": LADDER, "lr": 0.02}
    with pytest.raises(ValidationError, match=said):
        ScalingConfig.model_validate(given | keys)
