"""The runs of router_balance.py: what is asked for, and what their folders say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muonscale.lab.run_folder import RunFolder

SEEDS = (0, 1, 2)
VARIANTS = {"bias": [], "off": ["routing.bias_rate=null"]}
LABELS = {"bias": "bias update", "off": "no update"}


@dataclass(frozen=True)
class Balanced:
    """How a run was routed; arrays have an element for every step, the first being step 1."""

    seed: int
    violation: np.ndarray
    """MaxVio, mean over layers."""
    worst: np.ndarray
    """MaxVio of the worst layer."""
    quietest: np.ndarray
    """Smallest load of an expert over the mean load, of all layers."""
    dead: np.ndarray
    """Experts that no token chose, of all layers together."""
    entropy: np.ndarray
    validation_loss: float
    """Loss on the whole validation split, nats per token."""


def words(folder: Path, variant: str, seed: int) -> list[str]:
    """Return what `muonscale` is asked to do for a run."""
    path = folder / f"{variant}-seed{seed}"
    asked = [f"run.path={path}", f"run.seed={seed}", "run.threads=1", *VARIANTS[variant]]
    return ["train", "moonlight-nano", *asked]


def read(path: Path, seed: int) -> Balanced:
    """Read the folder of a finished run."""
    run = RunFolder(path)
    if (result := run.result()) is None:
        raise SystemExit(f"{path} is not a finished run")
    routing = [r["routing"] for r in run.read_metrics("train")]
    column = {key: np.array([r[key] for r in routing]) for key in routing[0]}
    return Balanced(
        seed=seed,
        violation=column["max_violation"],
        worst=column["max_violation_worst"],
        quietest=column["quietest_share"] * shape(path)["n_routed_experts"],
        dead=column["dead_experts"],
        entropy=column["entropy"],
        validation_loss=result["validation_loss"],
    )


def shape(path: Path) -> dict[str, int]:
    """Return the configuration of the model in a run folder."""
    return json.loads((path / "model" / "config.json").read_text(encoding="utf-8"))
