from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("router_balance")


def routed(step: int) -> dict[str, Any]:
    figures = {
        "max_violation": 1 / step,
        "max_violation_worst": 2 / step,
        "dead_experts": step % 2,
        "quietest_share": 0.1,
        "entropy": 0.8,
    }
    return {"kind": "train", "step": step, "routing": figures}


def finished(path: Path) -> Path:
    """Write what is read of a run of four steps with 8 experts."""
    (path / "model").mkdir(parents=True)
    records = [*map(routed, range(1, 5)), {"kind": "eval", "step": 4, "validation_loss": 3.5}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (path / "model" / "config.json").write_text(json.dumps({"n_routed_experts": 8}))
    (path / "result.json").write_text(json.dumps({"validation_loss": 3.5}))
    return path


def test_a_run_is_read_step_by_step(bench: ModuleType, tmp_path: Path) -> None:
    run = bench.read(finished(tmp_path / "run"), seed=1)
    assert run.violation.tolist() == [1, 1 / 2, 1 / 3, 1 / 4]
    assert run.worst.tolist() == [2, 1, 2 / 3, 1 / 2]
    assert run.quietest.tolist() == pytest.approx([0.8] * 4)  # of the mean share, 1/8
    assert run.dead.tolist() == [1, 0, 1, 0]
    assert run.validation_loss == 3.5


def test_an_unfinished_run_is_refused(bench: ModuleType, tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    (path / "result.json").unlink()
    with pytest.raises(SystemExit, match="is not a finished run"):
        bench.read(path, seed=1)


def test_a_window_ends_at_its_step(bench: ModuleType) -> None:
    values = np.arange(1.0, 31.0)  # the value of a step is its number
    assert bench.mean_until(values, 20, 10) == 15.5  # 11 to 20
    assert bench.mean_until(values, 30, 1) == 30
    assert bench.mean_until(values, 3, 10) == 2  # 1 to 3


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([2.9, 2.91, 2.9], "**-0.0967 nats**.*: lower"),
        ([3.1, 3.11, 3.1], "**+0.1033 nats**.*: higher"),
        ([3.1, 2.9, 3.01], "**+0.0033 nats**.*not significantly different from zero"),
    ],
)
def test_the_loss_is_said_either_way(bench: ModuleType, losses: list[float], said: str) -> None:
    def runs(values: list[float]) -> list[Any]:
        steps = np.ones(60)
        return [bench.Balanced(s, *[steps] * 5, validation_loss=v) for s, v in enumerate(values)]

    last = bench.verdict({"bias": runs(losses), "off": runs([3.0] * 3)})[-1]
    number, words = said.split(".*")
    assert number in last and words in last
