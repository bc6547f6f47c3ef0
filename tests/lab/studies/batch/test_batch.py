from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from muonscale.errors import ConfigError, StudyError
from muonscale.lab.config.load import Config
from muonscale.lab.fits.steps_to_loss import StepsToLoss
from muonscale.lab.report.page import Table, Verdict
from muonscale.lab.report.write import write_page
from muonscale.lab.run_folder import KindT, RunFolder
from muonscale.lab.studies.batch.analysis import read_steps
from muonscale.lab.studies.batch.config import BatchConfig
from muonscale.lab.studies.batch.laws import fit_variant_laws
from muonscale.lab.studies.batch.study import BatchStudy, depends_on_length
from muonscale.lab.studies.engine import StudyState, analyze_study, build_report, run_study
from muonscale.lab.studies.kinds import load_study
from muonscale.lab.studies.planned_run import PlannedRun
from muonscale.lab.studies.study import Outcome
from tests.lab.studies.conftest import end_all, end_with, search

BATCHES = [256, 512, 1024, 2048, 4096, 8192]
TARGET = 4.0
SMIN = {"adamw": 30.0, "muon": 20.0}
EMIN = {"adamw": 60_000.0, "muon": 50_000.0}

Make = Callable[..., BatchStudy]
Factor = Callable[[PlannedRun], float]

RECORDS: dict[Path, list[dict[str, Any]]] = {}
"""Of the runs of a test, by folder: 80,000 lines take long to write, and to read several times."""


@pytest.fixture(autouse=True)
def kept_records(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let runs that are made up have their records from RECORDS instead of metrics.jsonl."""
    read = RunFolder.read_metrics

    def kept(folder: RunFolder, kind: KindT | None = None) -> list[dict[str, Any]]:
        found = RECORDS.get(folder.path)
        if found is None:
            return read(folder, kind)
        return [record for record in found if kind in (None, record["kind"])]

    monkeypatch.setattr(RunFolder, "read_metrics", kept)
    yield
    RECORDS.clear()


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muonscale.lab.studies.batch.laws.RESAMPLES", 100)


@pytest.fixture
def study(tiny_keys: dict[str, Any], tmp_path: Path) -> Make:
    def make(**keys: Any) -> BatchStudy:
        own = {key: x for key, x in tiny_keys.items() if key not in ("train.steps", "eval.every")}
        own.pop("train.batch_tokens")
        constant = {"schedule.name": "constant", "schedule.warmup": 2, "train.tokens": 300_000}
        given = {
            "path": tmp_path / "study",
            "set": {**own, **constant},
            "batches": BATCHES,
            "search": search(start=0.02),
            "targets": [TARGET],
            "executor": {"kind": "inline"},
        }
        return BatchStudy(BatchConfig.model_validate(given | keys))

    return make


def place(run: PlannedRun) -> tuple[str, int, float, int]:
    c = run.coordinates
    return str(c["variant"]), int(c["batch"]), float(c["lr"]), int(c["seed"])


def law_tokens(run: PlannedRun) -> float:
    """Emin + Smin B, the tokens of McCandlish's law, more at learning rates that are not the middle."""
    variant, batch, lr, _ = place(run)
    return (EMIN[variant] + SMIN[variant] * batch) * off_the_middle(batch, lr)


def off_the_middle(batch: int, lr: float) -> float:
    """Return how many times more tokens a learning rate takes than the best one, which takes 1."""
    return math.exp(abs(math.log(lr / best_lr(batch))))


def best_lr(batch: int) -> float:
    """Return a rate on the grid: twice as much at every fourfold batch."""
    return 0.02 * 2 ** (BATCHES.index(batch) // 2)


def finished(run: PlannedRun, path: Path, tokens: float) -> Outcome:
    """Return a run that is at the target after so many tokens: loss is a power of the tokens."""
    path.mkdir(parents=True, exist_ok=True)
    batch, config = run.config.train.batch_tokens, run.config
    last, every = config.steps, config.eval.every
    seen = sorted({*range(every, last + 1, every), last})
    losses = [TARGET * (tokens / (step * batch)) ** 0.1 for step in seen]
    records: list[dict[str, Any]] = [
        {
            "kind": "train",
            "step": n,
            "tokens": n * batch,
            "step_ms": 5 + batch / 100,
            "optimizer_ms": 4,
            # It grows with the tokens, as if by chance also with the variant.
            "noise_scale": {"scale": (n * batch + len(str(run.coordinates["variant"]))) or None},
        }
        for n in range(1, last + 1)
    ]
    records += [
        {
            "kind": "eval",
            "step": s,
            "tokens": s * batch,
            "validation_loss": x,
            "validation_tokens": 9,
        }
        for s, x in zip(seen, losses, strict=True)
    ]
    RECORDS[path] = records
    env = {"flops": None, "versions": {"torch": "2"}, "device_name": "x", "threads": 1}
    (path / "env.json").write_text(json.dumps(env))
    result = {"validation_loss": losses[-1], "train_seconds": 1.0}
    return Outcome(run, RunFolder(path), "finished", result)


def ended(study: BatchStudy, tmp_path: Path, tokens: Factor = law_tokens) -> dict[str, Outcome]:
    """Return outcomes of all runs; infinite tokens are a run that diverged, NaN one that failed."""

    def end(run: PlannedRun) -> Outcome:
        value = tokens(run)
        if not math.isfinite(value):
            return end_with(lambda _: value)(run)
        return finished(run, tmp_path / "runs" / run.id, value)

    return end_all(study, end)


def findings(study: BatchStudy, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Return what is found, as it is in result.json."""
    runs = {id: outcome.run for id, outcome in outcomes.items()}
    return json.loads(json.dumps(analyze_study(study, StudyState(runs, outcomes)), allow_nan=False))


def noisy(sigma: float) -> Factor:
    """Return tokens of the law with the luck of the seed and noise of each run."""

    def tokens(run: PlannedRun) -> float:
        variant, batch, lr, seed = place(run)
        rng = np.random.default_rng((len(variant), batch, int(1e6 * lr), seed))
        return law_tokens(run) * math.exp(0.1 * seed + sigma * rng.standard_normal())

    return tokens


# plan


def test_every_batch_has_its_search_length_and_seeds(study: Make, tmp_path: Path) -> None:
    made = study(steps=100, seeds=[1, 2])
    assert [place(run) for run in made.plan({})] == [
        ("adamw", 256, 0.02, 0),
        ("muon", 256, 0.02, 0),
    ]
    outcomes = ended(made, tmp_path)
    for outcome in outcomes.values():
        variant, batch, lr, seed = place(outcome.run)
        config = outcome.run.config
        assert (config.optimizer.rule, config.train.batch_tokens) == (variant, batch)
        assert (config.optimizer.lr, config.run.seed) == (lr, seed)
        assert config.train.tokens == max(300_000, 100 * batch)
        assert 40 <= config.steps / config.eval.every < 60
    measured = {place(o.run) for o in outcomes.values() if o.run.coordinates["seed"] != 0}
    assert measured == {
        (variant, batch, best_lr(batch), seed)
        for variant in ("adamw", "muon")
        for batch in BATCHES
        for seed in (1, 2)
    }
    assert sum(e.runs for e in made.expected(outcomes)) == len(outcomes)
    assert sum(e.most for e in made.expected({})) == 2 * 6 * (6 + 2)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"batches": [256, 512]}, "at least 3"),
        ({"batches": [256, 1024, 512]}, "batches=.* must rise"),
        ({"batches": [0, 256, 512]}, "greater than 0"),
        (
            {"search": {"keys": {"a": {"key": "eval.every", "start": 1}}}},
            "the study sets it itself",
        ),
        ({"baseline": "sgd"}, "baseline: no variant 'sgd'"),
        ({"variants": ["muon"]}, "at least 2"),
        ({"targets": [3.0, 3.0]}, "targets=.* repeats"),
        ({"seeds": [1, 1]}, "seeds=.* repeats"),
        ({"evaluations": 1}, "greater than or equal to 2"),
    ],
)
def test_wrong_studies_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        BatchConfig.model_validate({"path": "x", "batches": BATCHES, "search": search()} | keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"batches": [256, 500, 1024]},
            "batches: 500 is not a multiple of data.sequence_length=32",
        ),
        ({"set": {"train.batch_tokens": 256}}, "set.train.batch_tokens: the study sets"),
        ({"set": {"run.seed": 1}}, "set.run.seed"),
    ],
)
def test_what_cannot_be_planned_is_refused(study: Make, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        study(**keys).plan({})


def test_a_recipe_of_steps_is_refused(study: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    text = "run: {path: x}\nmodel: {preset: llama-pico}\ndata: {source: python-stdlib}\n"
    recipe.write_text(text + "train: {steps: 7}\n")
    with pytest.raises(ConfigError, match=r"train.steps=7: .* give train.tokens"):
        study(base=str(recipe), set={}).plan({})


@pytest.mark.parametrize(
    ("schedule", "depends"),
    [
        ({"name": "constant", "warmup": 10}, False),
        ({"name": "constant", "warmup": 0}, False),
        ({"name": "constant", "warmup": 0.1}, True),
        ({"name": "cosine", "warmup": 10}, True),
        ({"name": "wsd", "warmup": 10}, True),
        ({"name": "stages", "stages": [{"until": 5e4, "warmup": 0.9}, {"warmup": 0}]}, False),
        ({"name": "stages", "stages": [{"until": 0.5, "warmup": 0.9}, {"warmup": 0}]}, True),
    ],
)
def test_schedules_that_depend_on_the_length_are_told(
    study: Make, schedule: dict[str, Any], depends: bool
) -> None:
    for stage in schedule.get("stages", []):
        stage["name"] = "constant"
    tree = study().plan({})[0].config.model_dump() | {"schedule": schedule}
    assert depends_on_length(Config.model_validate(tree).schedule) is depends


# findings


def test_a_known_law_is_found(study: Make, tmp_path: Path) -> None:
    made = study()
    found = findings(made, ended(made, tmp_path))
    (target,) = found["targets"]
    assert "passed" not in found and found["notes"] == []
    for variant in target["variants"]:
        name = variant["name"]
        for at, batch in zip(variant["places"], BATCHES, strict=True):
            assert at["tokens"] == pytest.approx(EMIN[name] + SMIN[name] * batch, rel=1e-6)
            assert at["values"] == {"lr": best_lr(batch)}
            assert (at["state"], at["tuned"], at["edges"]) == ("reached", True, [])
        law = {e["name"]: e for e in variant["mccandlish"]["estimates"]}
        assert law["Smin"]["value"] == pytest.approx(SMIN[name], rel=1e-6)
        assert law["Emin"]["value"] == pytest.approx(EMIN[name], rel=1e-6)
        overhead = law["batch with 20 % more data than 256"]["value"]
        spent = EMIN[name] + SMIN[name] * np.array([256, overhead])
        assert spent[1] / spent[0] == pytest.approx(1.2, rel=1e-6)
        assert variant["optimal"]["estimates"][0]["value"] == 256
    (ratio,) = target["ratios"]
    for row in ratio["rows"]:
        expected = law_ratio(row["batch"])
        assert row["ratio"] == pytest.approx(expected, rel=1e-6)
    mean = np.mean([math.log(law_ratio(b)) for b in BATCHES])
    assert ratio["saved"]["value"] == pytest.approx(1 - math.exp(-mean), rel=1e-6)


def law_ratio(batch: int) -> float:
    adamw, muon = (EMIN[name] + SMIN[name] * batch for name in ("adamw", "muon"))
    return adamw / muon


def test_others_read_steps_from_the_result(study: Make, tmp_path: Path) -> None:
    def tokens(run: PlannedRun) -> float:
        variant, batch, *_ = place(run)
        return 1e9 if (variant, batch) == ("adamw", 8192) else noisy(0.02)(run)

    made = study()
    found = findings(made, ended(made, tmp_path, tokens))
    steps = read_steps(found)[TARGET]["adamw"]
    places = found["targets"][0]["variants"][0]["places"]
    assert steps.batches.tolist() == BATCHES
    assert steps.reached.tolist() == [True] * 5 + [False]
    assert steps.log_steps[-1] == np.inf
    assert np.exp(steps.log_steps[2]) == pytest.approx(places[2]["tokens"] / 1024)
    assert steps.freedom == 11 * 2 - 11 - 1  # 11 cells, two seeds
    # The noise of a mean of two seeds; one cell's seeds differ by the effect of the seed and noise.
    assert steps.error[0] == pytest.approx(found["targets"][0]["sigma"] / math.sqrt(2), rel=1e-6)
    assert 0.005 < steps.error[0] < 0.04
    with pytest.raises(StudyError, match="places"):
        read_steps({"places": []})


def test_noise_is_that_of_seeds_and_intervals_hold_the_law(study: Make, tmp_path: Path) -> None:
    made = study(seeds=[0, 1, 2])
    (target,) = findings(made, ended(made, tmp_path, noisy(0.03)))["targets"]
    assert target["sigma"] == pytest.approx(0.03, rel=0.6)
    assert target["freedom"] == (12 - 1) * (3 - 1)
    (ratio,) = target["ratios"]
    held = [row["low"] < law_ratio(row["batch"]) < row["high"] for row in ratio["rows"]]
    assert sum(held) >= 4
    for row in ratio["rows"]:
        width = math.log(row["high"] / row["low"])
        assert width == pytest.approx(2 * 1.717 * target["sigma"] * math.sqrt(2 / 3), rel=1e-3)
    saved = [-math.log1p(-ratio["saved"][end]) for end in ("low", "high")]
    six = 2 * 1.717 * target["sigma"] * math.sqrt(2 / 3 / 6)  # ratios of six batches, independent
    assert saved[1] - saved[0] == pytest.approx(six, rel=1e-3)
    for variant in target["variants"]:
        smin = variant["mccandlish"]["estimates"][0]
        luck = math.exp(0.1)  # the mean luck of three seeds, which all batches share
        assert smin["low"] < luck * SMIN[variant["name"]] < smin["high"] < 1.3 * smin["low"]


def test_intervals_of_a_law_are_students_of_the_noise() -> None:
    """The law is nearly straight in its noise: errors follow from its Jacobian."""
    batches = np.array(BATCHES, np.float64)
    log_s = np.log(20 + 50_000 / batches)
    steps = StepsToLoss(batches=batches, log_steps=log_s, error=np.full(6, 0.01), freedom=4)
    smin, emin = ([e.low, e.high] for e in fit_variant_laws(steps, (0,)).mccandlish.estimates[:2])
    least = 20 / np.exp(log_s)
    jacobian = np.stack([least, 1 - least], axis=1)
    errors = 0.01 * np.sqrt(np.diag(np.linalg.inv(jacobian.T @ jacobian)))
    for ends, error in zip((smin, emin), errors, strict=True):
        assert math.log(ends[1] / ends[0]) == pytest.approx(
            2 * stats.t.ppf(0.95, 4) * error, rel=0.2
        )


def test_noise_scales_are_those_when_the_loss_was_reached(study: Make, tmp_path: Path) -> None:
    batch = study(seeds=[0])
    outcomes = ended(batch, tmp_path)
    found = findings(batch, outcomes)
    assert [row["variant"] for row in found["noise_scale"]] == ["adamw", "muon"]
    for row, variant in zip(found["noise_scale"], found["targets"][0]["variants"], strict=True):
        tokens = [p["tokens"] for p in variant["places"] if p["state"] == "reached"]
        sizes = [p["batch"] for p in variant["places"] if p["state"] == "reached"]
        before = [
            math.floor(t / b * (1 + 1e-9)) * b + len(row["variant"])
            for t, b in zip(tokens, sizes, strict=True)
        ]
        assert row["low"] == min(before) and row["high"] == max(before)
        assert row["scale"] == pytest.approx(math.exp(np.log(before).mean()))
    page = build_report(batch, found, outcomes)
    assert "noise-scale" in {table.name for table in page.tables}


def test_the_frontier_is_drawn_from_the_same_runs(study: Make, tmp_path: Path) -> None:
    batch = study(frontier={"devices": [1, 2, 4]})
    outcomes = ended(batch, tmp_path)
    found = findings(batch, outcomes)["frontier"]
    assert found["why"] == ""
    (steps,) = read_steps(findings(batch, outcomes)).values()
    for curve in found["curves"]:
        own = steps[curve["optimizer"]]
        for point in curve["points"]:
            # A step takes 1 ms, 10 microseconds a token of the device's share, and the optimizer.
            share, n = own.batches / point["devices"], point["devices"]
            seconds = (1 + share / 100 + 4 / n) / 1000
            whole = (own.batches / 32) % n == 0
            times = np.where(whole, np.exp(own.log_steps) * seconds, np.inf)
            assert point["seconds"] == pytest.approx(times.min(), rel=1e-6)
    page = build_report(batch, findings(batch, outcomes), outcomes)
    assert {"frontier", "frontier-cost"} <= {chart.name for chart in page.charts}
    assert [run.id for run in batch.plan({})] == [
        run.id for run in study().plan({})
    ]  # no run depends on it


@pytest.mark.parametrize(("error", "told"), [(0.005, True), (0.1, False)])
def test_a_law_that_misses_by_more_than_the_noise_is_remarked(error: float, told: bool) -> None:
    batches = np.array(BATCHES, np.float64)
    steps = StepsToLoss(  # McCandlish's law, which has no corner
        batches=batches,
        log_steps=np.log(20 + 50_000 / batches),
        error=np.full(6, error),
        freedom=10,
    )
    laws = fit_variant_laws(steps, (0,))
    assert ("the law misses by" in laws.regimes.remark) is told
    assert "misses" not in laws.mccandlish.remark


def claims(found: dict[str, Any]) -> list[bool | None]:
    return [claim["passed"] for claim in found["targets"][0]["ratios"][0]["claims"]]


def test_claims_are_judged(study: Make, tmp_path: Path) -> None:
    made = study()
    found = findings(made, ended(made, tmp_path, noisy(0.005)))
    # R rises from 1.22 to 1.43; both have the fewest tokens at the smallest batch; 25 % are saved.
    assert claims(found) == [True, True, None, True]

    def falling(run: PlannedRun) -> float:
        variant, batch, lr, _ = place(run)
        gain = (batch / 256) ** 0.2 / 1.2 if variant == "muon" else 1.0
        return 60_000 * noisy(0.005)(run) / law_tokens(run) * gain * off_the_middle(batch, lr)

    found = findings(made, ended(made, tmp_path, falling))
    above, decreasing, _, saved = claims(found)
    assert (above, decreasing, saved) == (False, False, False)
    text = found["targets"][0]["ratios"][0]["claims"][1]["text"]
    assert "largest drop 50" in text or "largest drop 49" in text
    assert "from 256 to 8,192" in text


def test_no_claim_is_judged_where_a_batch_is_not_tuned(study: Make, tmp_path: Path) -> None:
    made = study(search=search(start=0.02, begin="start", most=3))  # 0.08 is best at batch 8192
    found = findings(made, ended(made, tmp_path, noisy(0.005)))
    (target,) = found["targets"]
    assert [p["tuned"] for p in target["variants"][1]["places"]] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert claims(found) == [None] * 4
    assert all("not tuned" in claim["text"] for claim in target["ratios"][0]["claims"])


def test_a_later_token_optimum_is_told(study: Make, tmp_path: Path) -> None:
    def tokens(run: PlannedRun) -> float:
        variant, batch, lr, seed = place(run)
        best = {"adamw": 512, "muon": 2048}[variant]
        noise = np.random.default_rng((batch, int(1e6 * lr), seed)).standard_normal()
        return 50_000 * (1 + 0.1 * abs(math.log2(batch / best))) * math.exp(0.005 * noise)

    made = study()
    found = findings(made, ended(made, tmp_path, tokens))
    assert claims(found)[2] is True
    optimal = [v["optimal"]["estimates"][0] for v in found["targets"][0]["variants"]]
    assert [(e["low"], e["value"], e["high"]) for e in optimal] == [(512,) * 3, (2048,) * 3]


def test_a_loss_that_is_not_reached_is_bounded(study: Make, tmp_path: Path) -> None:
    def tokens(run: PlannedRun) -> float:
        variant, batch, lr, _ = place(run)
        if variant == "adamw" and batch == 8192:
            return 1e7  # beyond the end of the run
        if variant == "adamw" and batch == 1024 and lr > 0.03:
            return math.inf
        if variant == "muon" and batch == 256:
            return 100.0  # below the target at the first evaluation
        return law_tokens(run)

    made = study()
    outcomes = ended(made, tmp_path, tokens)
    found = findings(made, outcomes)
    adamw, muon = found["targets"][0]["variants"]
    length = made.plan(outcomes)[-1].config
    last = adamw["places"][-1]
    assert (last["state"], last["tokens"]) == (">", None)
    assert last["bound"] == pytest.approx(length.steps * 8192)
    assert (adamw["places"][2]["values"], adamw["places"][2]["tuned"]) == ({"lr": 0.02}, True)
    first = muon["places"][0]
    every = math.ceil(300_000 / 256) // 40
    assert first["state"] == "<" and first["bound"] == pytest.approx(every * 256)
    rows = found["targets"][0]["ratios"][0]["rows"]
    assert rows[0]["ratio"] is None
    assert rows[-1]["censored"] == ">"
    assert rows[-1]["ratio"] == pytest.approx(last["bound"] / muon["places"][-1]["tokens"])
    assert claims(found)[0] is None


def test_targets_are_chosen_that_all_reach(study: Make, tmp_path: Path) -> None:
    made = study(targets=None)
    outcomes = ended(made, tmp_path, noisy(0.01))
    found = findings(made, outcomes)
    assert found["chosen"] is True
    losses = [target["target"] for target in found["targets"]]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    for target in found["targets"]:
        for variant in target["variants"]:
            assert {at["state"] for at in variant["places"]} == {"reached"}
    measured = (o for o in outcomes.values() if place(o.run)[2] == best_lr(place(o.run)[1]))
    hardest = max(outcome.loss for outcome in measured)
    assert losses[-1] == pytest.approx(math.ceil(hardest * 100) / 100)


def test_one_seed_has_no_intervals(study: Make, tmp_path: Path) -> None:
    made = study(seeds=[0])
    outcomes = ended(made, tmp_path, noisy(0.01))
    found = findings(made, outcomes)
    (target,) = found["targets"]
    assert target["freedom"] == 0
    assert target["variants"][0]["places"][0]["low"] is None
    assert target["variants"][0]["mccandlish"]["estimates"][0]["low"] is not None  # by residuals
    assert claims(found) == [None] * 4
    assert build_report(made, found, outcomes).charts


@pytest.mark.slow
def test_the_page_of_one_seed_is_written(study: Make, tmp_path: Path) -> None:
    made = study(seeds=[0])
    outcomes = ended(made, tmp_path, noisy(0.01))
    page = build_report(made, findings(made, outcomes), outcomes)
    assert write_page(page, tmp_path / "report").exists()


# page


def test_the_page_has_all_of_it(study: Make, tmp_path: Path) -> None:
    def tokens(run: PlannedRun) -> float:
        broken = place(run) == ("adamw", 256, 0.02, 1)
        return math.nan if broken else noisy(0.01)(run)

    made = study(variants=["adamw", "muon"])
    outcomes = ended(made, tmp_path, tokens)
    found = findings(made, outcomes)
    page = build_report(made, found, outcomes)
    assert {chart.name for chart in page.charts} == {
        *("ratio", "ratio-0", "steps-0", "tokens-mccandlish-0", "tokens-regimes-0"),
        *("frontier", "frontier-cost", "search-adamw-lr", "search-muon-lr"),
    }
    assert {table.name for table in page.tables if table.name} == {
        *("ratios-muon-0", "critical", "noise-scale", "tokens-0", "laws-0", "exponents-0"),
        *("frontier-points", "frontier-ratios", "frontier-assumptions", "searched", "settings"),
    }
    critical = next(table for table in page.tables if table.name == "critical")
    assert len(critical.rows) == 2 * (2 + 1 + 2)
    verdicts = [b for s in page.sections for b in s.blocks if isinstance(b, Verdict)]
    assert len(verdicts) == 4 + 1 and verdicts[0].text.startswith("Loss 4: tokens of adamw / muon")
    failed = next(s for s in page.sections if s.title == "Failed runs")
    (table,) = (b for b in failed.blocks if isinstance(b, Table))
    assert table.rows == (("adamw batch=256 lr=0.02 seed=1", "broken"),)
    text = (write_page(page, tmp_path / "report").parent / "report.md").read_text()
    assert "nan" not in text.lower()


def test_an_unfinished_study_has_a_page(study: Make, tmp_path: Path) -> None:
    for targets in ([TARGET], None):
        made = study(targets=targets)
        runs = {run.id: run for run in made.plan({})}
        waiting = {id: Outcome(run, RunFolder(Path("no")), "waiting") for id, run in runs.items()}
        found = findings(made, waiting)
        assert found["missing"] == 2
        write_page(build_report(made, found, waiting), tmp_path / "report")


def test_a_schedule_by_length_is_remarked(study: Make, tmp_path: Path) -> None:
    keys = {**study().config.set, "schedule.name": "cosine"}
    made = study(set=keys)
    found = findings(made, ended(made, tmp_path))
    assert "constant learning rate" in found["notes"][0]


def test_the_shipped_study_is_fair() -> None:
    study = load_study("batch-nano")
    run, *_ = study.plan({})
    assert not depends_on_length(run.config.schedule)
    expected = study.expected({})
    assert sum(e.runs for e in expected) == 2 * 6 * (7 + 3)
    assert {e.example.config.train.tokens for e in expected} == {
        1_160_000,
        100 * 16384,
        100 * 32768,
    }


@pytest.mark.slow
def test_a_real_study_ends_with_a_page(study: Make, tmp_path: Path) -> None:
    keys = {**study().config.set, "train.tokens": 1024, "data.validation": 0.01}
    small = {
        "batches": [64, 128, 256],
        "search": search(settings=1, most=3),
        "seeds": [0],
        "steps": 8,
        "evaluations": 8,
    }
    made = study(**small, targets=None, set=keys)
    found = run_study(made, lambda _: None)
    assert found["missing"] == 0 and found["failed"] == [] and found["notes"] == []
    hardest = found["targets"][-1]
    for variant in hardest["variants"]:
        assert [at["state"] for at in variant["places"]] == ["reached"] * 3
    steps = read_steps(json.loads((tmp_path / "study" / "result.json").read_text()))
    assert steps[hardest["target"]]["muon"].reached.all()
    assert (tmp_path / "study" / "report" / "report.md").exists()
    runs = list((tmp_path / "study" / "runs").iterdir())
    assert len(runs) == 2 * 3 * 3
