"""Run folders with made-up records, finished or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muonscale.lab.config.load import dump_config, load_config

RESULT = {
    "step": 40,
    "tokens": 163_840,
    "validation_loss": 3.25,
    "validation_loss_se": 0.0123,
    "bits_per_byte": 1.5,
    "unigram_loss": 6.0,
    "bigram_loss": 4.25,
    "perplexity": 25.79,
    "train_seconds": 20.0,
    "tokens_per_second": 8192.4,
    "optimizer_share": 0.086,
    "skipped_steps": 1,
    "parameters": 1_685_888,
    "sample": "def f(<b>):\n    pass",
}

ENV = {
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "device": "cpu",
    "command": ["/somewhere/muonscale/__main__.py", "train", "demo", "run.path=a b"],
    "data": {
        "books": {
            "train": {"tokens": 1_000_000},
            "validation": {"tokens": 50_000},
            "read": {"tokens": 163_840, "share": 1.0, "epochs": 0.16},
        }
    },
}


def training(step: int) -> dict[str, Any]:
    """Return a record as the trainer writes it, of a mixture of experts with attention heard."""
    return {
        "kind": "train",
        "step": step,
        "tokens": 4096 * step,
        "loss": 3 + 4 / step,
        "lr": {"hidden": 0.01, "norm": 0.01},
        "grad_norm": {"hidden": 3.0, "norm": 4.0},
        "update_rms": 0.2,
        "spikes": {"grad_norm": int(step >= 25), "update_rms": 0},
        "skipped_steps": int(step >= 30),
        "tokens_per_second": 8000.0 + step,
        "step_ms": 500.0,
        "optimizer_ms": 50.0,
    }


def routed(step: int) -> dict[str, Any]:
    """Return what a mixture of experts adds to a training record."""
    routing = {"max_violation": 1.0, "max_violation_worst": 2.0, "dead_experts": 3}
    return {"routing": routing | {"busiest_share": 0.5, "quietest_share": 0.0, "entropy": 0.9}}


def heard(step: int, layers: int = 2) -> dict[str, Any]:
    """Return what a step adds in which attention was heard."""
    logits = [float(step + layer) for layer in range(layers)]
    return {"attention": {"max_logit": logits, "share_above_100": [0.0] * layers}}


def telemetry(step: int) -> dict[str, Any]:
    """Return a record of telemetry."""
    matrix = {"weight_svd_entropy": 0.9, "weight_stable_rank": 30.0, "update_svd_entropy": 0.95}
    return {
        "kind": "telemetry",
        "step": step,
        "groups": {"hidden": {"update_to_weight": 0.1}},
        "matrices": {"AttnQO": matrix, "Dense": matrix},
    }


def evaluation(step: int) -> dict[str, Any]:
    """Return a record of an evaluation."""
    return {"kind": "eval", "step": step, "tokens": 4096 * step, "validation_loss": 3.2 + 4 / step}


def records(steps: int = 40) -> list[dict[str, Any]]:
    """Return the records of a plain run."""
    found = [training(step) for step in range(1, steps + 1)]
    return found + [evaluation(step) for step in range(10, steps + 1, 10)]


def write_run(
    folder: Path,
    lines: Sequence[dict[str, Any]],
    *overrides: str,
    result: dict[str, Any] | None = RESULT,
    env: dict[str, Any] = ENV,
) -> Path:
    """Write a run folder, and return it."""
    folder.mkdir(parents=True)
    config = load_config("demo", [f"run.path={folder}", "train.steps=40", *overrides])
    (folder / "config.json").write_text(dump_config(config), encoding="utf-8")
    (folder / "env.json").write_text(json.dumps(env), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder
