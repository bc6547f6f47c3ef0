"""What a run has started from: `RUN/start/`, written before its first step.

A resumed run takes weights and state from its checkpoint, and shape and tokenizer from here, so that
the folder it was imported from may be gone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from muonscale.errors import CheckpointError
from muonscale.lab.config.load import Config
from muonscale.lab.files import write_json
from muonscale.lab.models.pretrained import fingerprint, weight_files
from muonscale.lab.run_folder import RunFolder

FACTS = "origin.json"
KEPT = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Files of a checkpoint's configuration and tokenizer, by suffix."""


def start_folder(folder: RunFolder) -> Path:
    """Return where a run keeps what it has started from."""
    return folder.path / "start"


def record_origin(config: Config, folder: RunFolder) -> None:
    """Keep configuration and tokenizer of the checkpoint, and hashes of weights and state.

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
            facts["weights"] = {
                "folder": str(weights.absolute()),
                "files": fingerprint(weight_files(weights)),
            }
            for path in weights.iterdir():
                if path.suffix in KEPT and not path.name.endswith(".index.json"):
                    shutil.copyfile(path, start / path.name)
        if state is not None:
            facts["optimizer_state"] = {"path": str(state.absolute()), **fingerprint([state])}
        write_json(start / FACTS, facts)
    except OSError as error:
        raise CheckpointError(f"{start} cannot be written: {error}") from error


def origin(folder: RunFolder) -> dict[str, Any]:
    """Return where weights and optimizer state of a run came from, with sizes and hashes.

    Raises:
        CheckpointError: if what says so is damaged.
    """
    path = start_folder(folder) / FACTS
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; restore it, or remove it to go on without it"
        ) from error


def as_resumed(config: Config, folder: RunFolder) -> Config:
    """Return the configuration of a run that has a checkpoint, with the files it kept.

    Its tokenizer is the kept one only where the checkpoint's folder is gone: prepared tokens are
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
