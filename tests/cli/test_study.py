from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.studies import write_recipe
from tests.conftest import Muonscale


@pytest.fixture
def recipe(corpus_file: Path, cache: Path, tmp_path: Path) -> str:
    return str(write_recipe(tmp_path, corpus_file, cache))


def test_plan_run_and_status(muonscale: Muonscale, recipe: str, tmp_path: Path) -> None:
    plan = muonscale("study", "plan", recipe)
    assert plan.code == 0
    assert "adamw lr=0.02 seed=0" in plan.out
    assert ": 2 runs, 2,048 tokens" in plan.out
    assert not (tmp_path / "study").exists()
    tree = json.loads(muonscale("study", "plan", recipe, "--json", "seeds=[5]").out)
    assert tree["totals"]["all"]["runs"] == 2
    assert sum(row["runs"] for row in tree["account"]["lines"]) == 2 * (3 + 1)

    run = muonscale("study", "run", recipe)
    assert run.code == 0, run.err
    assert "muon lr=0.04 seed=0: validation loss" in run.out
    result = json.loads((tmp_path / "study" / "result.json").read_text())
    (place,) = result["places"]
    assert [v["name"] for v in place["variants"]] == ["adamw", "muon"]
    reach = place["variants"][1]["reach"]["adamw"]["flops"]
    assert 0 < reach["amount"] < 1.001 * reach["end"]
    assert "one seed" in place["notes"][0]
    (comparison,) = place["comparisons"]
    assert f"{comparison['difference']:+.4f} nats" in run.out  # the verdict is on the console

    status = muonscale("study", "status", tmp_path / "study")
    assert "6 finished" in status.out
    rows = json.loads(muonscale("study", "status", recipe, "--json").out)["runs"]
    assert {row["state"] for row in rows} == {"finished"}


def test_failed_runs_give_exit_code_1(muonscale: Muonscale, recipe: str) -> None:
    wrong = "set.data.path=/no/such/file"
    answer = muonscale("study", "run", recipe, wrong)
    assert answer.code == 1
    assert "/no/such/file" in answer.err
    assert "--retry" in answer.err
    status = muonscale("study", "status", recipe, wrong)
    assert "2 failed" in status.out


def test_one_study_at_a_time(muonscale: Muonscale) -> None:
    answer = muonscale("study", "run", "a", "b")
    assert answer.code == 2
    assert "a and b" in answer.err
    assert muonscale("study", "plan", "seeds=3").code == 2
