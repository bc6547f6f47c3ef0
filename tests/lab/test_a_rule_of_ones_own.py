"""A rule that is registered in one file is known to the command line, the pages and the reports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.blocks import options
from tests.conftest import Muonscale
from tests.distributed.made_up_rule import tilt_rule


@pytest.fixture(autouse=True)
def rule() -> Iterator[None]:
    with tilt_rule():
        yield


@pytest.fixture
def words(tiny: list[str]) -> list[str]:
    return [*tiny, "optimizer.rule=tilt", "optimizer.tilt=0.85"]


def test_a_run_trains_resumes_and_has_a_report_and_a_card(
    words: list[str], tmp_path: Path, muonscale: Muonscale
) -> None:
    assert muonscale("train", *words).code == 0
    losses = [
        record["validation_loss"]
        for record in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
        if record.get("validation_loss") is not None
    ]
    assert losses[-1] < losses[0] - 0.1
    weights = (tmp_path / "run/model/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run/model")
    (tmp_path / "run/result.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000012")
    assert muonscale("train", tmp_path / "run", "--resume").code == 0
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == weights
    assert muonscale("report", tmp_path / "run").code == 0
    page = next((tmp_path / "run/report").glob("*.html")).read_text(encoding="utf-8")
    assert "trained with Tilt" in page
    assert muonscale("export", tmp_path / "run", tmp_path / "model").code == 0
    card = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    assert "`optimizer.rule` | tilt" in card and "`optimizer.tilt` | 0.85" in card


def test_inspect_lists_it(muonscale: Muonscale) -> None:
    found = json.loads(muonscale("inspect", "demo", "optimizer.rule=tilt", "--json").out)
    assert found["rules"]["tilt"]["parameters"] > 0


def test_plan_counts_its_state(muonscale: Muonscale) -> None:
    def states(rule: str) -> int:
        answer = muonscale("plan", "demo", f"optimizer.rule={rule}", "--layout", "ddp=2", "--json")
        return json.loads(answer.out)["memory"]["parts"]["matrix_state"]

    assert states("tilt") > 2 * states("muon") > 0  # two values per element, and some per row


@pytest.mark.slow
def test_bench_measures_it(muonscale: Muonscale) -> None:
    words = ("demo", "optimizer.rule=tilt", "model.preset=llama-pico", "--rounds", 1, "--json")
    found = json.loads(muonscale("bench", *words).out)
    assert {part["rule"] for part in found["parts"]} == {"tilt", "adamw"}


def test_the_reference_page_has_its_options() -> None:
    page = options.rule_options()
    assert "## Tilt" in page
    assert "| `tilt` | `0.9` | Decay rate of the averages. |" in page
