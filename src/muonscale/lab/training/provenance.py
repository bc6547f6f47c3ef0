"""The origin of a run's weights and optimizer state: `RUN/start/`, written before its first step.

A resumed run reads weights and state from its checkpoint, and the model configuration and the
tokenizer from this folder. The checkpoint it started from may be deleted.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from muonscale.errors import CheckpointError
from muonscale.lab.config.load import Config
from muonscale.lab.files import read_object, write_json
from muonscale.lab.models.pretrained import hash_files, weight_files
from muonscale.lab.run_folder import RunFolder

FACTS = "origin.json"
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Suffixes of the configuration and tokenizer files of a checkpoint."""


def start_folder(folder: RunFolder) -> Path:
    """Return the folder of the files that a run started from."""
    return folder.path / "start"


def record_provenance(config: Config, folder: RunFolder) -> None:
    """Copy configuration and tokenizer of the checkpoint, and write hashes of weights and state.

    Raises:
        CheckpointError: if a file cannot be read or written.
    """
    weights, state = config.model.weights, config.optimizer.state
    if weights is None and state is None:
        return
    start = start_folder(folder)
    facts: dict[str, Any] = {}
    try:
        start.mkdir(exist_ok=True)
        if weights is not None:
            files = hash_files(weight_files(weights))
            facts["weights"] = {"folder": str(weights.absolute()), "files": files}
            for path in weights.iterdir():
                if path.suffix in COPIED and not path.name.endswith(".index.json"):
                    shutil.copyfile(path, start / path.name)
        if state is not None:
            facts["optimizer_state"] = {"path": str(state.absolute()), **hash_files([state])}
        write_json(start / FACTS, facts)
    except OSError as error:
        raise CheckpointError(f"{start} cannot be written: {error}") from error


def read_provenance(folder: RunFolder) -> dict[str, Any]:
    """Return the origin of a run's weights and optimizer state, with sizes and hashes.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = start_folder(folder) / FACTS
    return read_object(path, "restore it, or remove it to continue without it") or {}


def use_start_folder(config: Config, folder: RunFolder) -> Config:
    """Return the configuration of a run that has a checkpoint, with the files in its start folder.

    The tokenizer is replaced only if the original checkpoint folder is gone: prepared tokens are
    found by the files of the tokenizer.
    """
    weights, start = config.model.weights, start_folder(folder)
    if weights is None or not start.is_dir():
        return config
    model = config.model.model_copy(update={"weights": start})
    data, name = config.data, config.data.tokenizer
    if name is not None and Path(name) == weights and not weights.exists():
        data = data.model_copy(update={"tokenizer": str(start)})
    return config.model_copy(update={"model": model, "data": data})
