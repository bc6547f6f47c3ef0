"""The model to evaluate and the settings of the evaluation.

The target is a checkpoint of a run, its finished model, or a Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from muonscale.errors import CheckpointError, ConfigError
from muonscale.lab.config.load import (
    ALTERNATIVES,
    Config,
    load_config,
    parse_override,
    resolve_config,
)
from muonscale.lab.files import sha256
from muonscale.lab.models.convert import load_hf
from muonscale.lab.models.pretrained import hash_files
from muonscale.lab.parallel.apply import parallelize
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.targets import is_hugging_face
from muonscale.lab.training.checkpoint import MANIFEST, load_facts, saved_steps
from muonscale.lab.training.export import (
    checkpoint_model,
    find_checkpoint,
    run_tokenizer,
    tokenizer_folder,
)
from muonscale.lab.training.provenance import use_start_folder
from muonscale.lab.training.setup import resolve_device, resolve_precision

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")

TEXT_KEYS = ALTERNATIVES[0]
"""Keys that select a text."""

OTHER_KEYS = ("run.device", "run.threads", "eval.batch_tokens", "train.precision")
"""Keys of an evaluation in addition to `data.*`."""

OWN_DATA_KEYS = ("data.cache", "data.sequence_length")
"""Keys of `data` that do not change a run's validation split."""

BATCH_TOKENS = 8192
"""Tokens of a batch if the configured number is not a multiple of the sequence length."""

LONGEST = 4096
"""Default maximum of the sequence length for a model folder; logits need memory in proportion."""


@dataclass(frozen=True, kw_only=True)
class EvalTarget:
    """A model with its tokenizer and its identity."""

    folder: Path
    """Folder of the run or the model."""
    model: PreTrainedModel
    """The model on the CPU."""
    tokenizer: PreTrainedTokenizerBase
    weights: str
    """SHA-256 of the checkpoint's manifest, or of the sizes and hashes of the weight files."""
    is_run: bool
    """Whether it is the model of a run, not of a model folder."""
    step: int | None = None
    """Optimizer steps of the run; None for a model folder."""
    trained_on: str | dict[str, str] | None = None
    """Fingerprint of the run's data, if it is known."""
    baselines: dict[str, float] | None = None
    """Losses of the run's n-gram models, if this is the last step of a finished run."""

    @property
    def positions(self) -> int | None:
        """Maximum number of tokens of the model, if its configuration has one."""
        number = getattr(self.model.config, "max_position_embeddings", None)
        return number if isinstance(number, int) else None


@dataclass(frozen=True)
class EvalSettings:
    """The configuration of an evaluation."""

    config: Config
    """Configuration; `data`, `eval`, `run` and `train.precision` are used."""
    gives_text: bool
    """Whether the overrides select a text."""
    names_own: bool = False
    """Whether they select a corpus of the run itself."""

    @property
    def batch_rows(self) -> int:
        """Sequences of a batch."""
        return self.config.eval.batch_tokens // self.config.data.sequence_length


def open_target(
    path: Path, step: int | None, overrides: Sequence[str], log: Callable[[str], None]
) -> tuple[EvalTarget, EvalSettings]:
    """Return the model in a run or model folder, and the settings of its evaluation.

    Raises:
        CheckpointError: if the folder has no usable model.
        ConfigError: for a folder of another kind, or an override that an evaluation does not
            support.
    """
    if is_hugging_face(path):
        if step is not None:
            raise ConfigError(f"{path} is a model folder, which has no steps; leave out @{step}")
        model, tokenizer = load_hf(path)
        weights = _digest(path)
        target = EvalTarget(
            folder=path, model=model, tokenizer=tokenizer, weights=weights, is_run=False
        )
        return target, folder_settings(path, target.positions, overrides)
    run = RunFolder(path)
    if not run.exists:
        raise ConfigError(
            f"{path} is neither a run folder nor a Hugging Face model folder: "
            f"{'it has no config.json' if path.exists() else 'it does not exist'}"
        )
    settings = run_settings(run, overrides)
    return run_target(run, step, log), settings


def run_target(run: RunFolder, step: int | None, report: Callable[[str], None]) -> EvalTarget:
    """Return a checkpoint of a run: that of a step, or the newest complete one.

    If the run has no checkpoints left, it is the finished model.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    result = run.result() or {}
    keys = ("unigram_loss", "bigram_loss")
    losses = {key: result[key] for key in keys} if all(key in result for key in keys) else None
    if step is None and not saved_steps(run.checkpoints) and result:
        model, tokenizer = load_hf(run.model)
        return EvalTarget(
            folder=run.path,
            model=model,
            tokenizer=tokenizer,
            weights=_digest(run.model),
            is_run=True,
            step=result.get("step"),
            baselines=losses,
        )
    checkpoint = find_checkpoint(run, step, report)
    facts = load_facts(checkpoint)
    return EvalTarget(
        folder=run.path,
        model=checkpoint_model(checkpoint, facts),
        tokenizer=run_tokenizer(run),
        weights=sha256(checkpoint / MANIFEST),
        is_run=True,
        step=facts["step"],
        trained_on=facts["data fingerprint"],
        baselines=losses if result.get("step") == facts["step"] else None,
    )


def _digest(folder: Path) -> str:
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    if not files:
        raise CheckpointError(f"{folder} contains no weights; accepted: {', '.join(WEIGHTS)}")
    return hashlib.sha256(json.dumps(hash_files(files), sort_keys=True).encode()).hexdigest()


def load_on_device(target: EvalTarget, config: Config) -> tuple[Parallelized, Processes]:
    """Put a model on the device of the configuration, for one process.

    Forward passes have the precision of training, unless the weights are not float32: these are
    used in their own dtype.

    Raises:
        ConfigError: for a device or a precision that this machine does not support, and for
            train.precision if the weights are not float32.
    """
    device = resolve_device(config.run.device)
    precision = resolve_precision(config.train, device)
    processes = Processes(device=device)
    model: Any = target.model
    if model.dtype == torch.float32:
        return parallelize(model.to(device), None, config.train, processes, precision), processes
    if config.train.precision != "auto":
        raise ConfigError(
            f"train.precision={config.train.precision}: the weights are {model.dtype} and are used "
            "in this dtype; leave it out"
        )
    # Float32 stands for no cast.
    return Parallelized(model.to(device), model, torch.float32), processes


def run_settings(run: RunFolder, overrides: Sequence[str]) -> EvalSettings:
    """Return the settings to evaluate a run on its own data, or on a text of the overrides.

    Raises:
        ConfigError: for an override that an evaluation does not support, or that would change the
            run's validation split.
    """
    saved = load_config(str(run.path))
    config = use_start_folder(saved, run)
    names = _check_keys(overrides)
    gives_text = any(name in TEXT_KEYS for name in names)
    if gives_text:
        kept = {"cache", "sequence_length", "errors", "validation"}
        data = config.data.model_dump(mode="json", include=kept)
        data["tokenizer"] = str(tokenizer_folder(run))
    else:
        data = config.data.model_dump(mode="json")
        _check_own_data_keys(names)
    sections = {
        "run": config.run.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "eval": config.eval.model_dump(mode="json"),
        "train": {"precision": config.train.precision},
    }
    resolved = _resolve(sections, data, overrides)
    names_own = gives_text and not _locations(resolved).isdisjoint(_locations(saved))
    if names_own:
        _check_own_data_keys([name for name in names if name not in TEXT_KEYS])
    return EvalSettings(resolved, gives_text, names_own)


def _locations(config: Config) -> set[str]:
    """Return the sources or paths of the corpora of a configuration."""
    return {
        part.source or "\n".join(str(Path(path).expanduser().resolve()) for path in part.paths)
        for part in config.data.corpora
    }


def folder_settings(folder: Path, positions: int | None, overrides: Sequence[str]) -> EvalSettings:
    """Return the settings to evaluate a Hugging Face folder.

    Args:
        folder: folder of the model and its tokenizer.
        positions: maximum number of tokens of the model, if it has one.
        overrides: `section.key=value`; if they select no text, none is measured.

    Raises:
        ConfigError: for an override that an evaluation does not support.
    """
    names = _check_keys(overrides)
    gives_text = any(name in TEXT_KEYS for name in names)
    data: dict[str, Any] = {
        "tokenizer": str(folder),
        "sequence_length": min(positions or LONGEST, LONGEST),
    }
    if not gives_text:
        if given := [name for name in names if name.startswith("data.")]:
            raise ConfigError(
                f"{given[0]} is given without a text; select one with {', '.join(TEXT_KEYS)}"
            )
        data["source"] = "python-stdlib"  # required by the section, but not read
    sections = {"run": {"path": str(folder)}, "model": {"config": str(folder)}, "train": {}}
    return EvalSettings(_resolve(sections, data, overrides), gives_text)


def _check_keys(overrides: Sequence[str]) -> list[str]:
    names = [text.partition("=")[0] for text in overrides]
    for name in names:
        if name in ("data.tokenizer", "data.vocab_size"):
            raise ConfigError(
                f"{name} is given: a model is evaluated with its own tokenizer; leave it out"
            )
        if not name.startswith("data.") and name not in OTHER_KEYS:
            raise ConfigError(
                f"an evaluation has no {name}; accepted: data.* and {', '.join(OTHER_KEYS)}"
            )
    return names


def _check_own_data_keys(names: list[str]) -> None:
    for name in names:
        if name.startswith("data.") and name not in OWN_DATA_KEYS:
            raise ConfigError(
                f"{name} would change the validation split of the run's data; accepted: "
                f"{', '.join(OWN_DATA_KEYS)}, or another text with {', '.join(TEXT_KEYS)}"
            )


def _resolve(sections: dict[str, Any], data: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Return the configuration, with batches of whole sequences."""
    given = {name: value for name, _, value in (text.partition("=") for text in overrides)}
    length = data["sequence_length"]
    if "data.sequence_length" in given:
        _, length = parse_override(f"data.sequence_length={given['data.sequence_length']}")
    evaluation, train = sections.get("eval", {}), {**sections["train"], "steps": 1}
    if isinstance(length, int) and length > 1:  # otherwise the error names data.sequence_length
        train["batch_tokens"] = length
        if evaluation.get("batch_tokens", BATCH_TOKENS) % length:
            evaluation["batch_tokens"] = max(1, BATCH_TOKENS // length) * length
    tree = {**sections, "data": data, "train": train, "eval": evaluation}
    return resolve_config(tree, overrides)
