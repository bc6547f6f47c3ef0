"""From a resolved configuration to the parts of a run."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from muonscale.errors import ConfigError, DataError
from muonscale.lab.config.load import Config
from muonscale.lab.config.sections import OptimizerSection, TrainSection
from muonscale.lab.data.prepare import Corpus, prepare
from muonscale.lab.models.build import build_model, meta_model, model_config
from muonscale.lab.models.packed import check_keeps_apart
from muonscale.lab.models.pretrained import load_weights, pretrained_config
from muonscale.lab.parallel.apply import parallelize
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import check_shares
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.attention import watch_attention
from muonscale.lab.training.batches import Batches, build_batches
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.groups import configured_groups, plan_transfer
from muonscale.lab.training.load_state import take_over_state
from muonscale.lab.training.microbatch_grads import check_parts
from muonscale.lab.training.provenance import as_resumed, origin
from muonscale.lab.training.router_balance import Routing, experts_implementation, plan_routing
from muonscale.lab.training.schedule import spans
from muonscale.lab.training.state import TrainState
from muonscale.lab.training.trackers.registry import Trackers
from muonscale.optim.muon import Muon
from muonscale.optim.newton_schulz.orthogonalize import ns_dtype
from muonscale.transfer.apply import Parametrization

NOT_OF_THE_OPTIMIZER = {
    *("rule", "max_grad_norm", "clip", "overrides", "state", "state_format"),
    *("qk_clip", "qk_clip_alpha"),
}
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
        raise ConfigError(f"run.device={name}: torch finds no GPU here; accepted: cpu, auto")
    return torch.device(name)


def resolve_precision(section: TrainSection, device: torch.device) -> torch.dtype:
    """Return the dtype of forward and backward passes.

    Raises:
        ConfigError: for bfloat16 on a GPU that has none.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if section.precision == "bfloat16" and device.type == "cuda" and not has_bf16:
        raise ConfigError(
            f"train.precision={section.precision}: this GPU has none; accepted: float32, auto"
        )
    if section.precision == "auto":
        return torch.bfloat16 if has_bf16 else torch.float32
    return getattr(torch, section.precision)


def build_optimizer(
    model: torch.nn.Module,
    section: OptimizerSection,
    process_group: dist.ProcessGroup | None = None,
    transfer: Parametrization | None = None,
) -> Muon:
    """Return the optimizer of the configuration for all trainable parameters of a model.

    Args:
        model: on any device, sharded or not.
        section: `optimizer.*`.
        process_group: ranks that hold plain tensors alike.
        transfer: multipliers of the model's parameters.
    """
    groups = configured_groups(model, section)
    if transfer is not None:
        groups = transfer.groups(groups)
    options = section.model_dump(exclude=NOT_OF_THE_OPTIMIZER)
    return Muon(groups, process_group=process_group, **options)


def model_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that decide the shape of a model, without those a library version adds."""
    ignored = ("transformers_version", "_name_or_path", "use_cache", "dtype", "torch_dtype")
    return {k: v for k, v in config.to_diff_dict().items() if k not in ignored}


def build_parallelized(
    config: Config,
    shape: PreTrainedConfig,
    processes: Processes,
    weights: Path | None,
    transfer: Parametrization | None = None,
) -> Parallelized:
    """Return the model of a run on its ranks, at step 0: a collective.

    The weights are those of one process: drawn, and scaled by `transfer`, or read from the
    checkpoint `weights`, by the first rank, and sent to the others.
    """
    precision = resolve_precision(config.train, processes.device)
    first = first_model(config, shape, processes, weights)
    if first is not None and transfer is not None:
        transfer.scale_weights_(first)
    if processes.many:
        model = meta_model(shape)
        if first is not None:
            model.generation_config = first.generation_config  # which is exported
        return parallelize(model, first, config.train, processes, precision)
    assert first is not None
    model = first.to(processes.device)  # pyrefly: ignore
    return parallelize(model, None, config.train, processes, precision)


def first_model(
    config: Config, shape: PreTrainedConfig, processes: Processes, weights: Path | None
) -> PreTrainedModel | None:
    """Return a model with the weights to start from, on the CPU of the first rank; None on others."""
    made: list[PreTrainedModel] = []

    def make() -> None:  # a model is not to be sent, an error is
        made.append(
            build_model(shape, seed=config.run.seed)
            if weights is None
            else load_weights(weights, shape)
        )

    processes.on_first(make)
    return made[0] if made else None


def model_shape(config: Config, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Return the configuration of the model that is trained on a tokenizer's tokens."""
    shape = _shape(config, tokenizer)
    if config.data.has_chats:
        check_keeps_apart(shape)
    return shape


def _shape(config: Config, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    length = config.data.sequence_length
    if config.model.weights is not None:
        return pretrained_config(config.model, tokens=len(tokenizer), sequence_length=length)
    return model_config(
        config.model,
        vocab_size=len(tokenizer),
        sequence_length=length,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
    )


@dataclass(frozen=True)
class Run:
    """Everything a run is made of."""

    config: Config
    folder: RunFolder
    console: RunConsole
    corpora: dict[str, Corpus]
    """By name; they share a tokenizer."""
    batches: Batches
    state: TrainState
    processes: Processes
    transfer: Parametrization | None = None
    """What `transfer.base` has come to."""
    trackers: Trackers = field(default_factory=Trackers)
    """Told of every record, on the first rank."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of all its text."""
        return shared_tokenizer(self.corpora)

    @property
    def device(self) -> torch.device:
        """Where this rank trains."""
        return self.processes.device

    def record(self, record: dict[str, Any]) -> None:
        """Add a record to the metrics of the run, once for all ranks."""
        if self.processes.is_first:
            self.folder.append_metrics(record)
            self.trackers.log(record)


def set_up(
    config: Config,
    folder: RunFolder,
    console: RunConsole,
    processes: Processes,
    *,
    fresh: bool = True,
) -> Run:
    """Prepare the data and build model, optimizer and batches of a run; write nothing to it.

    A collective of all ranks. Of a run that is not fresh, weights and optimizer state are still to
    come, from its checkpoint.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    check_shares(config, processes.topology)
    check_parts(config, processes.topology)
    given = config if fresh else as_resumed(config, folder)
    corpora = prepare_once(given, console, processes)
    shape = model_shape(given, shared_tokenizer(corpora))
    weights = config.model.weights if fresh else None
    transfer = plan_transfer(config, shape)
    forward = build_parallelized(config, shape, processes, weights, transfer)
    replicated = processes.many and processes.topology.data == "ddp"
    group = dist.group.WORLD if replicated else None
    optimizer = build_optimizer(forward.model, config.optimizer, group, transfer)
    if fresh and (path := config.optimizer.state) is not None:
        said = take_over_state(forward.model, optimizer, path, config.optimizer.state_format)
        console.say(f"optimizer  {said}")
    facts = {"data fingerprint": fingerprint(corpora), "model": model_facts(shape)}
    stages = spans(config.schedule, config.timeline)
    routing = Routing(forward.model, plan_routing(forward.model, config.routing, stages))
    attention = watch_attention(forward.model, config)
    state = TrainState(forward, optimizer, routing, facts, attention=attention)
    batches = build_batches(config, corpora, processes)
    trackers = Trackers(console.warn)
    return Run(config, folder, console, corpora, batches, state, processes, transfer, trackers)


def shared_tokenizer(corpora: dict[str, Corpus]) -> PreTrainedTokenizerFast:
    """Return the tokenizer that the corpora of a run have in common."""
    return next(iter(corpora.values())).tokenizer


def fingerprint(corpora: dict[str, Corpus]) -> str | dict[str, str]:
    """Return the fingerprint of a corpus, or of several by name."""
    found = {name: corpus.fingerprint for name, corpus in corpora.items()}
    return found if len(found) > 1 else next(iter(found.values()))


def prepare_once(config: Config, console: RunConsole, processes: Processes) -> dict[str, Corpus]:
    """Prepare the corpora on every machine once, and see that all have the same.

    Raises:
        DataError: where machines have different ones.
    """
    with console.stages() as report:
        corpora = processes.first_on_machine(
            lambda: prepare(config.data, seed=config.run.seed, report=report)
        )
    here, first = fingerprint(corpora), processes.on_first(lambda: fingerprint(corpora))
    if here != first:
        raise DataError(
            f"the corpus of rank {processes.rank} has the fingerprint {here}, that of rank 0 "
            f"{first}: give all machines the same files"
        )
    return corpora


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
        "attention": None if (watch := run.state.attention) is None else watch.facts(),
        "transfer": None if run.transfer is None else run.transfer.as_dict(),
        "command": sys.argv,
        **origin(run.folder),
    }
