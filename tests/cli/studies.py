"""A study of a few seconds, as a recipe of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def write_recipe(folder: Path, corpus_file: Path, cache: Path) -> Path:
    """Write the recipe of a comparison of six runs in folder/study, and return its path."""
    keys: dict[str, Any] = {
        "model.preset": "llama-pico",
        "data.path": str(corpus_file),
        "data.cache": str(cache),
        "data.vocab_size": 300,
        "data.sequence_length": 32,
        "train.steps": 4,
        "train.batch_tokens": 256,
        "eval.every": 1,
        "eval.batch_tokens": 2048,
        "eval.sample_tokens": 0,
    }
    study = {
        "study": "compare",
        "path": str(folder / "study"),
        "set": keys,
        "variants": ["adamw", "muon"],
        "baselines": ["adamw"],
        "search": {
            "keys": {"lr": {"key": "optimizer.lr", "start": 0.02}},
            "settings": 3,
            "most": 3,
        },
        "seeds": [0],
        "executor": {"kind": "inline"},
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(study))
    return path
