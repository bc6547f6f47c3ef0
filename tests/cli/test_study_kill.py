"""A study that is killed again and again ends with the report of one that was left alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

KILLS = 5
TABLES = [f"{name}-0.csv" for name in ("losses", "comparisons", "settings", "loss-by-flops")]
"""Of the report, those without seconds."""


@pytest.fixture
def keys(corpus_file: Path, cache: Path) -> dict[str, Any]:
    return {
        "model.preset": "llama-pico",
        "data.path": str(corpus_file),
        "data.cache": str(cache),
        "data.vocab_size": 300,
        "data.sequence_length": 32,
        "train.steps": 60,
        "train.batch_tokens": 512,
        "eval.every": 10,
        "eval.batch_tokens": 2048,
        "eval.sample_tokens": 0,
        "checkpoint.every": 10,
    }


def study(path: Path, keys: dict[str, Any]) -> list[str]:
    """Write a study that goes to `path` and return the command that does it."""
    recipe = {
        "study": "compare",
        "path": str(path),
        "set": keys,
        "variants": ["adamw", "muon"],
        "baselines": ["adamw"],
        "search": {
            "keys": {"lr": {"key": "optimizer.lr", "start": 0.02}},
            "settings": 3,
            "most": 4,
        },
        "seeds": [1, 2],
        "executor": {"workers": 2},
    }
    file = path.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    return [sys.executable, "-m", "muonscale", "study", "run", str(file)]


def kill(process: subprocess.Popen[bytes], *, workers: bool) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children if workers else []:
        child.kill()


def without_seconds(tree: Any) -> Any:
    """Leave out the only figures that two equal studies differ in."""
    if isinstance(tree, dict):
        return {key: without_seconds(value) for key, value in tree.items() if key != "seconds"}
    return [without_seconds(item) for item in tree] if isinstance(tree, list) else tree


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, keys: dict[str, Any]) -> None:
    whole = subprocess.run(study(tmp_path / "whole", keys), capture_output=True)
    assert whole.returncode == 0, whole.stderr
    moments = random.Random(0)
    command = study(tmp_path / "killed", keys)
    started: dict[str, int] = {}
    for number in range(KILLS):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(moments.uniform(2, 12))
        # Every other time the workers outlive the study, and it has to find what they go on doing.
        kill(process, workers=number % 2 == 0)
        for result in (tmp_path / "killed").glob("runs/*/result.json"):
            started.setdefault(str(result), result.stat().st_mtime_ns)
    last = subprocess.run(command, capture_output=True)
    assert last.returncode == 0, last.stderr
    for result, written in started.items():
        assert Path(result).stat().st_mtime_ns == written, "a finished run was done again"
    found = [
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")
    ]
    assert without_seconds(found[0]) == without_seconds(found[1])
    for name in TABLES:
        one, other = (tmp_path / n / "report" / "figures" / name for n in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name
