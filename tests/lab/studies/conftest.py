from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muonscale.lab.config.load import Config
from muonscale.lab.estimate import run_cost as of_run
from muonscale.lab.estimate.run_cost import RunCost, run_cost
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.studies.compare.config import CompareConfig
from muonscale.lab.studies.compare.study import CompareStudy
from muonscale.lab.studies.planned_run import PlannedRun, index_runs
from muonscale.lab.studies.study import Outcome, Study

Make = Callable[..., Any]
COSTS: dict[str, RunCost] = {}


def cost_once(config: Config) -> RunCost:
    """Return what `run_cost` returns, which builds a model: of the same run in many tests once."""
    key = config.model_dump_json(exclude={"run"})
    if key not in COSTS:
        COSTS[key] = run_cost(config)
    return COSTS[key]


@pytest.fixture(autouse=True)
def costs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let studies count the same run once."""
    monkeypatch.setattr(of_run, "run_cost", cost_once)


@pytest.fixture
def tiny_keys(corpus_file: Path, cache: Path) -> dict[str, Any]:
    """Keys of the demo that make a run of half a second."""
    return {
        "model.preset": "llama-pico",
        "data.path": str(corpus_file),
        "data.cache": str(cache),
        "data.vocab_size": 300,
        "data.sequence_length": 32,
        "data.validation": 0.02,
        "train.steps": 6,
        "train.batch_tokens": 256,
        "eval.every": 2,
        "eval.tokens": 1_000_000,
        "eval.batch_tokens": 2048,
        "eval.sample_tokens": 0,
        "checkpoint.every": 2,
    }


def search(start: float = 0.02, **keys: Any) -> dict[str, Any]:
    """Return a section that searches `lr`; keywords replace its other keys."""
    return {
        "keys": {"lr": {"key": "optimizer.lr", "start": start}},
        "settings": 3,
        "most": 6,
        **keys,
    }


def search_both(lr: float = 0.02, rest: float = 0.02, **keys: Any) -> dict[str, Any]:
    """Return a section that searches `lr` of matrices and `rest`."""
    rates = {"lr": {"key": "optimizer.lr", "start": lr}}
    rates["rest"] = {"key": "optimizer.adamw_lr", "start": rest}
    return {"keys": rates, "settings": 5, "most": 12, **keys}


def end_all(
    study: Study, end: Callable[[PlannedRun], Outcome], outcomes: dict[str, Outcome] | None = None
) -> dict[str, Outcome]:
    """Return outcomes of all runs that a study comes to want."""
    outcomes = dict(outcomes or {})
    while missing := [r for i, r in index_runs(study.plan(outcomes)).items() if i not in outcomes]:
        outcomes |= {run.id: end(run) for run in missing}
    return outcomes


def end_with(loss: Callable[[PlannedRun], float]) -> Callable[[PlannedRun], Outcome]:
    """Return a function that ends runs without folders: infinite losses diverge, NaN fails."""

    def end(run: PlannedRun) -> Outcome:
        value, folder = loss(run), RunFolder(Path("nowhere"))
        if math.isnan(value):
            return Outcome(run, folder, "failed", reason="broken")
        if math.isinf(value):
            return Outcome(run, folder, "diverged", reason="inf")
        return Outcome(run, folder, "finished", {"validation_loss": value})

    return end


@pytest.fixture
def compare(tiny_keys: dict[str, Any], tmp_path: Path) -> Callable[..., Study]:
    """Make a small comparison; keywords replace its keys."""

    def make(**keys: Any) -> Study:
        given = {
            "path": tmp_path / "study",
            "set": tiny_keys,
            "variants": ["adamw", "muon"],
            "baselines": ["adamw"],
            "search": search(),
            "seeds": [0, 1],
            "executor": {"kind": "inline"},
        }
        return CompareStudy(CompareConfig.model_validate(given | keys))

    return make
