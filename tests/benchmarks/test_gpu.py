"""The benchmark of a GPU, small and on the CPU: it runs to its end, and says what is wrong."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from muonscale.lab.bench import rates

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(rates, "RATE_SECONDS", 0.0)
    return importlib.import_module("gpu")


@pytest.mark.slow
def test_all_of_it_runs_on_the_cpu(gpu: Any, tmp_path: Path) -> None:
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["right"] for row in found["correctness"])
    assert len(found["correctness"]) == 6 + 1 + len(gpu.PRESETS)
    measured = {row["optimizer"]: row for row in found["steps"]}
    assert measured["torch AdamW, fused"]["times_ours"]["median"] > 0
    assert measured["muonscale float32"]["share_of_rate"] > 0
    (trained,) = found["training"]
    for key in ("tokens_per_second", "plain_tokens_per_second", "planned_tokens_per_second"):
        assert trained[key] > 0
    page = (tmp_path / "gpu.md").read_text()
    assert all(part in page for part in ("## Correctness", "## The step", "## Training"))


def test_a_wrong_rule_is_told(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert all(row["right"] for row in gpu.check_newton_schulz(cpu, tiny=True))
    right = gpu.orthogonalize
    monkeypatch.setattr(gpu, "orthogonalize", lambda *words: 1.1 * right(*words))
    assert not any(row["right"] for row in gpu.check_newton_schulz(cpu, tiny=True))


def test_without_a_gpu_it_says_what_can_be_done(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --tiny"):
        gpu.main([])
