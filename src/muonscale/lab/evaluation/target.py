"""What is evaluated: a checkpoint of a run, its finished model, or a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from muonscale.errors import CheckpointError, ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.models.convert import load_hf
from muonscale.lab.models.pretrained import fingerprint
from muonscale.lab.parallel.apply import parallelize
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.checkpoint import MANIFEST, load_facts, saved_steps
from muonscale.lab.training.export import checkpoint_model, find_checkpoint, run_tokenizer
from muonscale.lab.training.setup import resolve_device, resolve_precision

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and what tells it from others."""

    folder: Path
    """Of the run or the model."""
    model: PreTrainedModel
    """On the CPU."""
    tokenizer: PreTrainedTokenizerBase
    weights: str
    """SHA-256 of its weights: of the checkpoint's manifest, or of sizes and hashes of the files."""
    is_run: bool
    """Whether it is of a run, not of a model folder."""
    step: int | None = None
    """Optimizer steps of the run it had; None of a model folder."""
    trained_on: str | dict[str, str] | None = None
    """Fingerprint of the run's data, where it is known."""
    baselines: dict[str, float] | None = None
    """Losses of the n-gram models of the run, if this is its last step and it is finished."""

    @property
    def positions(self) -> int | None:
        """Tokens that the model takes, where it says so."""
        found = getattr(self.model.config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None


def run_subject(run: RunFolder, step: int | None, report: Callable[[str], None]) -> Subject:
    """Return a checkpoint of a run: that of a step, or the newest whole one.

    Where a run has no checkpoints left, it is its finished model.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    if step is None and not saved_steps(run.checkpoints) and run.result() is not None:
        return _finished(run)
    checkpoint = find_checkpoint(run, step, report)
    facts = load_facts(checkpoint)
    return Subject(
        folder=run.path,
        model=checkpoint_model(checkpoint, facts),
        tokenizer=run_tokenizer(run),
        weights=hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest(),
        is_run=True,
        step=facts["step"],
        trained_on=facts["data fingerprint"],
        baselines=_baselines(run, facts["step"]),
    )


def _finished(run: RunFolder) -> Subject:
    result = run.result() or {}
    model, tokenizer = load_hf(run.model)
    return Subject(
        folder=run.path,
        model=model,
        tokenizer=tokenizer,
        weights=_digest(run.model),
        is_run=True,
        step=result.get("step"),
        baselines=_baselines(run, result.get("step")),
    )


def _baselines(run: RunFolder, step: int | None) -> dict[str, float] | None:
    result = run.result() or {}
    keys = ("unigram_loss", "bigram_loss")
    if result.get("step") != step or not all(key in result for key in keys):
        return None
    return {key: result[key] for key in keys}


def folder_subject(folder: Path) -> Subject:
    """Return a Hugging Face model with its tokenizer.

    Raises:
        CheckpointError: if the folder does not hold them.
    """
    model, tokenizer = load_hf(folder)
    return Subject(
        folder=folder, model=model, tokenizer=tokenizer, weights=_digest(folder), is_run=False
    )


def _digest(folder: Path) -> str:
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    if not files:
        raise CheckpointError(f"{folder} holds no weights; accepted: {', '.join(WEIGHTS)}")
    return hashlib.sha256(json.dumps(fingerprint(files), sort_keys=True).encode()).hexdigest()


def ready(subject: Subject, config: Config) -> tuple[Parallelized, Processes]:
    """Put a model on the device of the configuration, for one process.

    Its forward passes have the precision of training, but where weights are not float32: these
    are used as they were saved.

    Raises:
        ConfigError: for a device or a precision that this machine does not have, and for
            train.precision where the weights decide.
    """
    device = resolve_device(config.run.device)
    precision = resolve_precision(config.train, device)
    if subject.model.dtype != torch.float32:
        if config.train.precision != "auto":
            raise ConfigError(
                f"train.precision={config.train.precision}: the weights are {subject.model.dtype} "
                "and are used as they are; leave it out"
            )
        precision = torch.float32  # nothing is cast on the way
    processes = Processes(device=device)
    model: Any = subject.model
    if subject.model.dtype == torch.float32:
        return parallelize(model.to(device), None, config.train, processes, precision), processes
    return Parallelized(model.to(device), model, precision), processes
