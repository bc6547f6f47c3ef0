"""From a resolved configuration to the parts of a run."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from muonscale.errors import ConfigError
from muonscale.lab.config import Config, OptimizerSection
from muonscale.lab.data.order import sequence_indices
from muonscale.lab.data.prepare import Corpus, prepare
from muonscale.lab.data.tokens import Sequences
from muonscale.lab.models.build import build_model, model_config
from muonscale.lab.run import RunFolder
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.state import TrainState
from muonscale.optim.groups import parameter_groups
from muonscale.optim.muon import Muon
from muonscale.optim.orthogonalize import ns_dtype

CHUNK = 256
"""Sequences read at a time where a whole split is walked through."""

NOT_OF_THE_OPTIMIZER = {"rule", "max_grad_norm", "clip", "overrides"}
"""Keys of the optimizer section that are for the groups or the trainer; the rest are Muon's."""

PACKAGES = ("muonscale", "torch", "transformers", "tokenizers", "numpy", "safetensors")


def resolve_device(name: str) -> torch.device:
    """Return the device to train on; `auto` takes a GPU if there is one.

    Raises:
        ConfigError: for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda: torch finds no GPU here; accepted: cpu, auto")
    return torch.device(name)


def build_optimizer(model: torch.nn.Module, section: OptimizerSection) -> Muon:
    """Return the optimizer of the configuration for all trainable parameters of a model."""
    groups = parameter_groups(
        model,
        lr=section.lr,
        weight_decay=section.weight_decay,
        rule=section.rule,
        overrides=section.overrides,
    )
    options = section.model_dump(exclude=NOT_OF_THE_OPTIMIZER)
    return Muon(groups, **options)


@dataclass(frozen=True)
class Batches:
    """The batches of a run: functions of the step alone. A batch is int64 [batch, length + 1]."""

    train: Sequences
    held_out: Sequences
    size: int
    """Sequences of one training batch."""
    evaluation_size: int
    """Sequences of one evaluation batch."""
    seed: int

    def at(self, step: int) -> np.ndarray:
        """Return the training batch of a step, the first being step 0."""
        indices = sequence_indices(step * self.size, self.size, len(self.train), self.seed)
        return self.train.batch(indices)

    def seen(self, steps: int, *, at_most: int) -> Iterator[np.ndarray]:
        """Yield what `steps` training steps read, each sequence once, up to `at_most` sequences."""
        count = min(steps * self.size, len(self.train), at_most)
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            yield self.train.batch(sequence_indices(start, size, len(self.train), self.seed))

    def evaluation(self, sequences: int | None = None) -> Iterator[np.ndarray]:
        """Yield held-out batches: all, or so many sequences spread evenly over the split."""
        total = len(self.held_out)
        count = total if sequences is None else max(1, min(sequences, total))
        indices = np.linspace(0, total - 1, count).round().astype(np.int64)
        for start in range(0, count, self.evaluation_size):
            yield self.held_out.batch(indices[start : start + self.evaluation_size])


def model_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that decide the shape of a model, without those a library version adds."""
    ignored = ("transformers_version", "_name_or_path", "use_cache", "dtype", "torch_dtype")
    return {k: v for k, v in config.to_diff_dict().items() if k not in ignored}


def build_model_of(config: Config, corpus: Corpus, device: torch.device) -> PreTrainedModel:
    """Return the freshly initialised model of a run."""
    shape = model_shape(config, corpus.tokenizer)
    return build_model(shape, seed=config.run.seed, device=device)


def model_shape(config: Config, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Return the configuration of the model that is trained on a tokenizer's tokens."""
    return model_config(
        config.model,
        vocab_size=len(tokenizer),
        sequence_length=config.data.sequence_length,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
    )


def build_batches(config: Config, corpus: Corpus) -> Batches:
    """Return the training and held-out batches of a run."""
    length = config.data.sequence_length
    return Batches(
        Sequences(corpus.train, length),
        Sequences(corpus.held_out, length),
        config.batch_sequences,
        config.eval.batch_tokens // length,
        config.run.seed,
    )


@dataclass(frozen=True)
class Run:
    """Everything a run is made of."""

    config: Config
    folder: RunFolder
    console: RunConsole
    corpus: Corpus
    batches: Batches
    state: TrainState
    device: torch.device


def set_up(config: Config, folder: RunFolder, console: RunConsole) -> Run:
    """Prepare the data and build model, optimizer and batches of a run; write nothing to it."""
    device = resolve_device(config.run.device)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with console.stages() as report:
        corpus = prepare(config.data, seed=config.run.seed, report=report)
    model = build_model_of(config, corpus, device)
    torch.manual_seed(config.run.seed)
    facts = {"data fingerprint": corpus.fingerprint, "model": model_facts(model.config)}
    state = TrainState(model, build_optimizer(model, config.optimizer), facts)
    return Run(config, folder, console, corpus, build_batches(config, corpus), state, device)


def environment(config: Config, device: torch.device) -> dict[str, Any]:
    """Return versions, device, threads and what `auto` chose, for env.json."""
    products = config.optimizer.ns_dtype
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "ns_dtype": str(ns_dtype(device))[len("torch.") :] if products == "auto" else products,
        "command": sys.argv,
    }
