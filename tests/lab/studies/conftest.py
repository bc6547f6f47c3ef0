from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muonscale.lab.config.load import Config
from muonscale.lab.estimate import run_cost as of_run
from muonscale.lab.estimate.run_cost import RunCost, run_cost
from muonscale.lab.studies.compare.config import CompareConfig
from muonscale.lab.studies.compare.study import CompareStudy
from muonscale.lab.studies.study import Study

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


@pytest.fixture
def compare(tiny_keys: dict[str, Any], tmp_path: Path) -> Callable[..., Study]:
    """Make a small comparison; keywords replace its keys."""

    def make(**keys: Any) -> Study:
        given = {
            "path": tmp_path / "study",
            "set": tiny_keys,
            "variants": ["adamw", "muon"],
            "baselines": ["adamw"],
            "lr": [0.005, 0.02],
            "seeds": [0, 1],
            "executor": {"kind": "inline"},
        }
        return CompareStudy(CompareConfig.model_validate(given | keys))

    return make
