from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from scipy import stats

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run_many(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("run_many")


def test_the_interval_of_two_groups_is_students(run_many: ModuleType) -> None:
    one, other = [3.1, 3.4, 3.3], [2.9, 3.0]
    expected = stats.ttest_ind(one, other).confidence_interval(0.9)
    difference, half, freedom = run_many.interval([one, other], 0, 1)
    assert (difference - half, difference + half) == pytest.approx((expected.low, expected.high))
    assert freedom == 3


def test_a_third_group_adds_to_the_variance_alone(run_many: ModuleType) -> None:
    groups = [[3.1, 3.5], [2.9, 3.0], [8.0, 8.2]]
    difference, half, freedom = run_many.interval(groups, 0, 1)
    assert difference == pytest.approx(0.35) and freedom == 3
    variance = (0.08 + 0.005 + 0.02) / 3
    assert half == pytest.approx(stats.t.ppf(0.95, 3) * variance**0.5)


def test_paired_differences_are_students(run_many: ModuleType) -> None:
    one, other = [1.0, 2.5, 3.7], [0.9, 2.0, 3.9]
    expected = stats.ttest_rel(one, other).confidence_interval(0.9)
    mean, half = run_many.paired(one, other)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))


def test_a_verdict_is_of_either_sign(run_many: ModuleType) -> None:
    assert run_many.verdict(-0.2, 0.1).endswith("-0.3000 to -0.1000: lower")
    assert run_many.verdict(0.2, 0.1).endswith(": higher")
    assert run_many.verdict(0.2, 0.3).endswith(": not significantly different from zero")


def test_a_finished_run_is_not_run_and_a_failing_one_is_named(
    run_many: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "result.json").write_text(json.dumps({"validation_loss": 1}))
    run_many.train([["train", "no recipe", f"run.path={tmp_path / 'done'}"]])
    with pytest.raises(SystemExit, match=r"ended with 2, see .*bad\.log"):
        run_many.train([["train", "no-recipe", f"run.path={tmp_path / 'bad'}"]])
    assert "unknown recipe 'no-recipe'" in (tmp_path / "bad.log").read_text()
