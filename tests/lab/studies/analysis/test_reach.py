from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from muonscale.errors import StudyError
from muonscale.lab.config.load import load_config
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.studies.analysis.curves import average_curves, read_curve
from muonscale.lab.studies.analysis.reach import reach
from muonscale.lab.studies.planned_run import PlannedRun
from muonscale.lab.studies.study import Outcome


def finished(path: Path, losses: list[float], seed: int = 0) -> Outcome:
    """Return a run of 10 steps of 100 tokens that was evaluated at even steps."""
    path.mkdir()
    records = [
        {"kind": "train", "step": n, "tokens": 100 * n, "step_ms": 20 if n > 1 else 500}
        for n in range(1, 11)
    ]
    records += [
        {"kind": "eval", "step": 2 * n, "tokens": 200 * n, "validation_loss": loss}
        for n, loss in enumerate(losses, 1)
    ]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    flops = {"per_token": 7, "newton_schulz_per_step": 1000}
    (path / "env.json").write_text(json.dumps({"flops": flops}))
    run = PlannedRun({"seed": seed}, load_config("demo", [f"run.seed={seed}"]))
    return Outcome(run, RunFolder(path), "finished", {"validation_loss": losses[-1]})


def test_a_curve_counts_newton_schulz_and_the_median_step(tmp_path: Path) -> None:
    curve = read_curve(finished(tmp_path / "a", [5, 4, 3, 2, 1]))
    assert curve.loss.tolist() == [5, 4, 3, 2, 1]
    assert curve.spent["tokens"].tolist() == [200, 400, 600, 800, 1000]
    assert curve.spent["flops"].tolist() == [7 * 100 * n + 1000 * n for n in (2, 4, 6, 8, 10)]
    assert curve.spent["seconds"].tolist() == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])


def test_what_is_spent_until_a_loss(tmp_path: Path) -> None:
    # loss = 8 * tokens^-0.5 * 20: a straight line in logarithms, so that interpolation is exact.
    tokens = np.arange(200, 1001, 200)
    runs = [finished(tmp_path / "a", (160 / np.sqrt(tokens)).tolist())]
    base = [finished(tmp_path / "base", [9, 8, 7, 6.8, 6.5])]
    found = reach({"a": runs, "base": base}, "base")["a"]
    assert found["tokens"].amount == pytest.approx((160 / 6.5) ** 2)
    assert found["steps"].amount == pytest.approx((160 / 6.5) ** 2 / 100)
    assert found["tokens"].censored == ""
    assert found["tokens"].ratio == pytest.approx((160 / 6.5) ** 2 / 1000)
    assert math.isnan(found["tokens"].low)  # one seed
    never = reach({"a": runs, "base": base}, "a")["base"]["tokens"]
    assert (never.censored, never.amount, never.end) == (">", pytest.approx(1000), 1000)
    assert math.isnan(never.ratio)
    easy = [finished(tmp_path / "easy", [200, 150, 130, 110, 100])]
    assert reach({"a": runs, "easy": easy}, "easy")["a"]["tokens"].censored == "<"


def test_the_ratio_is_taken_seed_by_seed(tmp_path: Path) -> None:
    tokens = np.arange(200, 1001, 200)
    runs, base = [], []
    for seed, (ends, reached) in enumerate([(400, 500), (320, 640)]):
        # Losses of the first fall as tokens^-0.5, and are those of the baseline's end at `reached`.
        losses = (ends / np.sqrt(tokens)).tolist()
        end = ends / math.sqrt(reached)
        runs.append(finished(tmp_path / f"a{seed}", losses, seed))
        base.append(
            finished(tmp_path / f"b{seed}", [end + 4, end + 3, end + 2, end + 1, end], seed)
        )
    found = reach({"a": runs, "b": base}, "b")
    logs = np.log([0.5, 0.64])
    own = found["a"]["tokens"]
    assert own.ratio == pytest.approx(math.exp(logs.mean()))
    half = 6.3138 * logs.std(ddof=1) / math.sqrt(2)  # Student's quantile with one degree of freedom
    assert own.high == pytest.approx(math.exp(logs.mean() + half), rel=1e-4)
    assert own.low == pytest.approx(math.exp(logs.mean() - half), rel=1e-4)
    assert (found["b"]["tokens"].ratio, found["b"]["tokens"].low) == pytest.approx((1, 1))


def test_the_mean_curve_of_seeds_is_what_crosses(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / "a", [5, 4, 3, 2, 1]),
        finished(tmp_path / "b", [7, 6, 5, 4, 3], seed=1),
    ]
    assert average_curves([read_curve(run) for run in runs]).loss.tolist() == [6, 5, 4, 3, 2]
    base = [finished(tmp_path / "base", [9, 8, 7, 5, 3])]
    assert reach({"a": runs, "base": base}, "base")["a"]["tokens"].amount == pytest.approx(800)


def test_one_evaluation_bounds_what_is_spent(tmp_path: Path) -> None:
    losses = {"a": [3], "low": [2], "high": [4]}
    runs = {name: [finished(tmp_path / name, each)] for name, each in losses.items()}
    assert reach(runs, "low")["a"]["tokens"].censored == ">"
    assert reach(runs, "high")["a"]["tokens"].censored == "<"


def test_different_evaluations_have_no_mean(tmp_path: Path) -> None:
    curves = [
        read_curve(finished(tmp_path / n, losses)) for n, losses in (("a", [2, 1]), ("b", [1]))
    ]
    with pytest.raises(StudyError, match="different steps"):
        average_curves(curves)


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    outcome = finished(tmp_path / "a", [1])
    outcome.folder.metrics.unlink()
    with pytest.raises(StudyError, match="is incomplete"):
        read_curve(outcome)
