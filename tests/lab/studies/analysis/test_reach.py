from __future__ import annotations

import json
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
    found = reach(6.5, {"a": runs})["a"]
    assert found["tokens"].amount == pytest.approx((160 / 6.5) ** 2)
    assert found["steps"].amount == pytest.approx((160 / 6.5) ** 2 / 100)
    assert found["tokens"].censored == ""
    never = reach(1.0, {"a": runs})["a"]["tokens"]
    assert (never.censored, never.amount, never.end) == (">", pytest.approx(1000), 1000)
    assert reach(100.0, {"a": runs})["a"]["tokens"].censored == "<"


def test_the_mean_curve_of_seeds_is_what_crosses(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / "a", [5, 4, 3, 2, 1]),
        finished(tmp_path / "b", [7, 6, 5, 4, 3], seed=1),
    ]
    assert average_curves([read_curve(run) for run in runs]).loss.tolist() == [6, 5, 4, 3, 2]
    assert reach(3, {"a": runs})["a"]["tokens"].amount == pytest.approx(800)


def test_one_evaluation_bounds_what_is_spent(tmp_path: Path) -> None:
    runs = [finished(tmp_path / "a", [3])]
    assert reach(2.0, {"a": runs})["a"]["tokens"].censored == ">"
    assert reach(4.0, {"a": runs})["a"]["tokens"].censored == "<"


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
