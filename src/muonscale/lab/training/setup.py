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
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from muonscale.errors import ConfigError, DataError
from muonscale.lab.config import Config, OptimizerSection, TrainSection
from muonscale.lab.data.order import sequence_indices
from muonscale.lab.data.prepare import Corpus, prepare
from muonscale.lab.data.tokens import Sequences
from muonscale.lab.models.build import build_model, meta_model, model_config
from muonscale.lab.parallel.apply import parallelize
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import check_shares
from muonscale.lab.run import RunFolder
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.routing import Routing, experts_implementation, plan_routing
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


def resolve_precision(section: TrainSection, device: torch.device) -> torch.dtype:
    """Return the dtype of forward and backward passes.

    Raises:
        ConfigError: for bfloat16 on a GPU that has none.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if section.precision == "bfloat16" and device.type == "cuda" and not has_bf16:
        raise ConfigError("train.precision=bfloat16: this GPU has none; accepted: float32, auto")
    if section.precision == "auto":
        return torch.bfloat16 if has_bf16 else torch.float32
    return getattr(torch, section.precision)


def build_optimizer(
    model: torch.nn.Module,
    section: OptimizerSection,
    process_group: dist.ProcessGroup | None = None,
) -> Muon:
    """Return the optimizer of the configuration for all trainable parameters of a model.

    Args:
        model: on any device, sharded or not.
        section: `optimizer.*`.
        process_group: ranks that hold plain tensors alike.
    """
    groups = parameter_groups(
        model,
        lr=section.lr,
        weight_decay=section.weight_decay,
        rule=section.rule,
        overrides=section.overrides,
    )
    options = section.model_dump(exclude=NOT_OF_THE_OPTIMIZER)
    return Muon(groups, process_group=process_group, **options)


@dataclass(frozen=True)
class Batches:
    """The batches of a run: functions of the step alone. A batch is int64 [batch, length + 1].

    The ranks of a run share every training batch, neighbours in it together.
    """

    train: Sequences
    held_out: Sequences
    size: int
    """Sequences of one training batch."""
    evaluation_size: int
    """Sequences of one evaluation batch."""
    seed: int
    rank: int = 0
    """Whose share of the training batches this is, ..."""
    ranks: int = 1
    """... of how many."""

    def at(self, step: int) -> np.ndarray:
        """Return this rank's share of the training batch of a step, the first being step 0."""
        share = self.size // self.ranks
        first = step * self.size + self.rank * share
        return self.train.batch(sequence_indices(first, share, len(self.train), self.seed))

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


def build_parallelized(
    config: Config, shape: PreTrainedConfig, processes: Processes
) -> Parallelized:
    """Return the freshly initialised model of a run on its ranks: a collective.

    The weights are those of one process: drawn by the first rank, and sent to the others.
    """
    precision = resolve_precision(config.train, processes.device)
    if processes.many:
        source = build_model(shape, seed=config.run.seed) if processes.is_first else None
        model = meta_model(shape)
    else:
        source, model = None, build_model(shape, seed=config.run.seed, device=processes.device)
    return parallelize(model, source, config.train, processes, precision)


def model_shape(config: Config, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Return the configuration of the model that is trained on a tokenizer's tokens."""
    return model_config(
        config.model,
        vocab_size=len(tokenizer),
        sequence_length=config.data.sequence_length,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
    )


def build_batches(config: Config, corpus: Corpus, processes: Processes) -> Batches:
    """Return the training and held-out batches of a run."""
    length = config.data.sequence_length
    return Batches(
        Sequences(corpus.train, length),
        Sequences(corpus.held_out, length),
        config.batch_sequences,
        config.eval.batch_tokens // length,
        config.run.seed,
        processes.data_rank,
        processes.topology.data_ranks,
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
    processes: Processes

    @property
    def device(self) -> torch.device:
        """Where this rank trains."""
        return self.processes.device

    def record(self, record: dict[str, Any]) -> None:
        """Add a record to the metrics of the run, once for all ranks."""
        if self.processes.is_first:
            self.folder.append_metrics(record)


def set_up(config: Config, folder: RunFolder, console: RunConsole, processes: Processes) -> Run:
    """Prepare the data and build model, optimizer and batches of a run; write nothing to it.

    A collective of all ranks.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    check_shares(config, processes.topology)
    corpus = prepare_once(config, console, processes)
    shape = model_shape(config, corpus.tokenizer)
    forward = build_parallelized(config, shape, processes)
    replicated = processes.many and processes.topology.data == "ddp"
    group = dist.group.WORLD if replicated else None
    optimizer = build_optimizer(forward.model, config.optimizer, group)
    facts = {"data fingerprint": corpus.fingerprint, "model": model_facts(shape)}
    routing = Routing(forward.model, plan_routing(forward.model, config.routing, config.steps))
    state = TrainState(forward, optimizer, routing, facts)
    batches = build_batches(config, corpus, processes)
    return Run(config, folder, console, corpus, batches, state, processes)


def prepare_once(config: Config, console: RunConsole, processes: Processes) -> Corpus:
    """Prepare the corpus on every machine once, and see that all have the same.

    Raises:
        DataError: where machines have different ones.
    """
    with console.stages() as report:
        corpus = processes.first_on_machine(
            lambda: prepare(config.data, seed=config.run.seed, report=report)
        )
    first = processes.on_first(lambda: corpus.fingerprint)
    if corpus.fingerprint != first:
        raise DataError(
            f"the corpus of rank {processes.rank} has the fingerprint {corpus.fingerprint}, that of "
            f"rank 0 {first}: give all machines the same files"
        )
    return corpus


def environment(run: Run) -> dict[str, Any]:
    """Return versions, device, processes and what `auto` chose, for env.json."""
    config, device, topology = run.config, run.device, run.processes.topology
    products = config.optimizer.ns_dtype
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name or platform.machine(),
        "processes": topology.world,
        "layout": str(topology),
        "threads": torch.get_num_threads(),
        "precision": str(run.state.forward.precision)[len("torch.") :],
        "ns_dtype": str(ns_dtype(device))[len("torch.") :] if products == "auto" else products,
        "experts": experts_implementation(run.state.model),
        "routing": run.state.routing.facts(),
        "command": sys.argv,
    }
