"""Build the parts of a run from its resolved configuration."""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from muonscale.errors import ConfigError, DataError, command_line
from muonscale.lab.config.load import Config
from muonscale.lab.config.sections import OptimizerSection, TrainSection
from muonscale.lab.console import dtype_text
from muonscale.lab.data.prepare import Corpus, prepare
from muonscale.lab.devices import recognize
from muonscale.lab.models.adapter import add_adapter
from muonscale.lab.models.build import build_model, meta_model
from muonscale.lab.models.config import model_config
from muonscale.lab.models.flops import flops_per_token, optimizer_flops
from muonscale.lab.models.packed_rows import check_isolates_conversations
from muonscale.lab.models.pretrained import load_weights, pretrained_config
from muonscale.lab.models.structure import expert_modules
from muonscale.lab.parallel.apply import parallelize
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.attention import monitor_attention
from muonscale.lab.training.average import build_average
from muonscale.lab.training.background_save import BackgroundSaver
from muonscale.lab.training.batches import Batches, build_batches
from muonscale.lab.training.checkpoint import (
    folder_name,
    load_facts,
    saved_steps,
    steps_to_keep,
)
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.load_optimizer_state import check_state_file, load_optimizer_state
from muonscale.lab.training.micro_batches import check_shares
from muonscale.lab.training.noise_scale import check_noise_scale
from muonscale.lab.training.param_groups import build_param_groups, plan_transfer
from muonscale.lab.training.provenance import read_provenance, use_start_folder
from muonscale.lab.training.router_balance import (
    RouterBalance,
    experts_implementation,
    plan_routing,
)
from muonscale.lab.training.schedule import build_option_schedule, spans
from muonscale.lab.training.state import TrainState
from muonscale.lab.training.trackers.registry import Trackers
from muonscale.optim.muon import Muon
from muonscale.optim.newton_schulz.kernels import taken_kernel
from muonscale.optim.newton_schulz.orthogonalize import ns_dtype
from muonscale.optim.options import GroupingOptions, names_of
from muonscale.transfer.apply import Parametrization

NOT_OF_THE_OPTIMIZER = {
    *("rule", "max_grad_norm", "clip", "overrides", "state", "state_format"),
    *("qk_clip", "qk_clip_alpha", *names_of(GroupingOptions)),
}
"""Keys of the optimizer section that configure groups or trainer; the rest are Muon's arguments."""

PACKAGES = ("muonscale", "torch", "transformers", "tokenizers", "numpy", "safetensors")


def resolve_device(name: str) -> torch.device:
    """Return the device to train on; `auto` selects a GPU of CUDA or ROCm if there is one.

    Raises:
        ConfigError: for a GPU on a machine without one.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in available and not available[name]():
        raise ConfigError(f"run.device={name}: torch finds no GPU here; accepted: cpu, auto")
    return torch.device(name)


def resolve_precision(section: TrainSection, device: torch.device) -> torch.dtype:
    """Return the dtype of forward and backward passes.

    Raises:
        ConfigError: for bfloat16 on a GPU that does not support it.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if section.precision == "bfloat16" and device.type == "cuda" and not has_bf16:
        raise ConfigError(
            f"train.precision={section.precision}: this GPU does not support it; accepted: "
            "float32, auto"
        )
    if section.precision == "auto":
        return torch.bfloat16 if has_bf16 else torch.float32
    return getattr(torch, section.precision)


def check_mps(model: torch.nn.Module, optimizer: Muon, config: Config) -> None:
    """Refuse what needs float64, which Apple's GPUs lack.

    Raises:
        ConfigError: naming the key or the kind of model.
    """
    groups = optimizer.param_groups
    asked = {
        "optimizer.ns_dtype=float64": any(g.get("ns_dtype") == "float64" for g in groups),
        "optimizer.pre_norm": any(g.get("pre_norm") not in (None, "none") for g in groups),
        "optimizer.qk_clip": config.optimizer.qk_clip is not None,
        "telemetry.attention_every": config.telemetry.attention_every is not None,
        "telemetry.noise_scale_every": config.telemetry.noise_scale_every is not None,
        "a mixture of experts": bool(expert_modules(model)),
    }
    for what, wanted in asked.items():
        if wanted:
            raise ConfigError(
                f"{what} needs float64, which run.device=mps lacks; use run.device=cpu"
            )


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
        process_group: ranks that hold identical replicas of plain tensors.
        transfer: multipliers of the model's parameters.
    """
    groups = build_param_groups(model, section)
    if transfer is not None:
        groups = transfer.groups(groups)
    options = section.model_dump(exclude=NOT_OF_THE_OPTIMIZER)
    return Muon(groups, process_group=process_group, **options)


def run_flops(config: Config, model: PreTrainedModel) -> dict[str, int] | None:
    """Return the FLOPs of a run as in env.json: per token, and of Newton-Schulz per step.

    None for a mixture of experts whose configuration does not say how many experts a token uses,
    and for adapters, whose frozen weights get no gradient.
    """
    if config.adapter.rank is not None:
        return None
    per_token = flops_per_token(model.config, model, config.data.sequence_length)
    if per_token is None:
        return None
    per_step = optimizer_flops(build_optimizer(model, config.optimizer).param_groups)
    return {"per_token": per_token, "newton_schulz_per_step": per_step}


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Return the FLOP/s of matrix products of a device, None if its model is not known."""
    if device.type != "cuda":
        return None
    known = recognize(torch.cuda.get_device_name(device))
    return None if known is None else known.flops.get(dtype_text(precision))


def model_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that define a model, without those that a library version adds."""
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

    The weights do not depend on the number of ranks: the first rank initializes them, scaled by
    `transfer`, or reads them from the checkpoint `weights`, and sends them to the others.
    """
    precision = resolve_precision(config.train, processes.device)
    built: list[PreTrainedModel] = []

    def build() -> None:  # the result of `on_first` is sent to all ranks, and a model is too large
        model = (
            build_model(shape, seed=config.run.seed)
            if weights is None
            else load_weights(weights, shape)
        )
        add_adapter(model, config.adapter, config.run.seed)
        built.append(model)

    processes.on_first(build)
    first = built[0] if built else None
    if first is not None and transfer is not None:
        transfer.scale_weights_(first)
    if processes.many:
        model = meta_model(shape)
        add_adapter(model, config.adapter, config.run.seed)
        if first is not None:
            model.generation_config = first.generation_config  # it is exported
        return parallelize(model, first, config.train, processes, precision)
    assert first is not None
    model = first.to(processes.device)  # pyrefly: ignore
    return parallelize(model, None, config.train, processes, precision)


def build_state(
    config: Config,
    shape: PreTrainedConfig,
    processes: Processes,
    transfer: Parametrization | None,
    *,
    weights: Path | None = None,
    facts: dict[str, Any] | None = None,
) -> TrainState:
    """Return model, optimizer and routing of a run at step 0: a collective.

    Args:
        config: the configuration of the run.
        shape: the Hugging Face configuration of its model.
        processes: the processes of the run.
        transfer: multipliers of the model's parameters.
        weights: the checkpoint folder to start from.
        facts: what a checkpoint must agree on with the run that continues it.
    """
    forward = build_parallelized(config, shape, processes, weights, transfer)
    replicated = processes.many and processes.topology.data == "ddp"
    group = dist.group.WORLD if replicated else None
    optimizer = build_optimizer(forward.model, config.optimizer, group, transfer)
    stages = spans(config.schedule, config.timeline)
    routing = RouterBalance(forward.model, plan_routing(forward.model, config.routing, stages))
    options = build_option_schedule(optimizer, config)
    return TrainState(forward, optimizer, routing, facts or {}, options=options)


def model_shape(config: Config, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Return the Hugging Face configuration of the model that is trained with a tokenizer."""
    length = config.data.sequence_length
    if config.model.weights is not None:
        shape = pretrained_config(config.model, tokens=len(tokenizer), sequence_length=length)
    else:
        shape = model_config(
            config.model,
            vocab_size=len(tokenizer),
            sequence_length=length,
            bos_id=tokenizer.bos_token_id,
            eos_id=tokenizer.eos_token_id,
        )
    check_isolates_conversations(shape, config.data)
    return shape


@dataclass(frozen=True)
class Run:
    """All parts of a run."""

    config: Config
    folder: RunFolder
    console: RunConsole
    corpora: dict[str, Corpus]
    """Corpora by name; they share a tokenizer."""
    batches: Batches
    state: TrainState
    processes: Processes
    transfer: Parametrization | None = None
    """Multipliers for `transfer.base`."""
    trackers: Trackers = field(default_factory=Trackers)
    """Trackers; on the first rank they log every record."""
    saver: BackgroundSaver | None = None
    """Writes checkpoints while training goes on, if `checkpoint.background` is set."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Tokenizer of all corpora."""
        return shared_tokenizer(self.corpora)

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.processes.device

    @property
    def resume_command(self) -> str:
        """The command line that goes on with the run."""
        return command_line("train", self.folder.path, "--resume")

    def record(self, record: dict[str, Any]) -> None:
        """Add a record to the metrics of the run, once for all ranks."""
        if self.processes.is_first:
            self.folder.append_metrics(record)
            self.trackers.log(record)

    def save(self, *, last: bool = False) -> None:
        """Write a checkpoint of this step: a collective of all ranks.

        Args:
            last: the run ends with it, so it is complete when this returns. Otherwise a background
                saver may still be writing it.

        Raises:
            CheckpointError: if it, or the one before it, could not be written.
        """
        if self.saver is not None and last:
            self.saver.wait()
        self.state.save(
            self.folder.checkpoints,
            self.processes,
            keep=self.config.checkpoint.keep,
            permanent=steps_to_keep(self.config),
            background=None if last else self.saver,
        )


def set_up(
    config: Config,
    folder: RunFolder,
    console: RunConsole,
    processes: Processes,
    *,
    fresh: bool = True,
) -> Run:
    """Prepare data, model, optimizer and batches of a run; write nothing to its folder.

    A collective of all ranks. If the run is not fresh, the caller restores weights and optimizer
    state from its checkpoint.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    check_shares(config, processes.topology)
    check_noise_scale(config, processes.topology)
    if fresh and config.optimizer.state is not None:
        check_state_file(config.optimizer.state)  # before the data are prepared
    given = config if fresh else use_start_folder(config, folder)
    before = () if fresh else processes.on_first(lambda: trained_on(folder))
    corpora = prepare_once(given, console, processes, before, stream=given.data.stream)
    shape = model_shape(given, shared_tokenizer(corpora))
    transfer = plan_transfer(config, shape)
    facts = {"data fingerprint": corpus_fingerprint(corpora), "model": model_facts(shape)}
    if config.adapter.rank is not None:
        facts["adapter"] = config.adapter.model_dump(mode="json")
    weights = config.model.weights if fresh else None
    state = build_state(config, shape, processes, transfer, weights=weights, facts=facts)
    if fresh and (path := config.optimizer.state) is not None:
        form = config.optimizer.state_format
        text = load_optimizer_state(state.model, state.optimizer, path, form)
        console.log(f"optimizer  {text}")
    if processes.device.type == "mps":
        check_mps(state.model, state.optimizer, config)
    if config.data.document_mask:
        state.forward.document_start = shared_tokenizer(corpora).bos_token_id
    state.attention = monitor_attention(state.model, config)
    state.average = build_average(state.model, config)
    return Run(
        config=config,
        folder=folder,
        console=console,
        corpora=corpora,
        batches=build_batches(config, corpora, processes),
        state=state,
        processes=processes,
        transfer=transfer,
        trackers=Trackers(console.warn),
        saver=BackgroundSaver(processes) if config.checkpoint.background else None,
    )


def shared_tokenizer(corpora: dict[str, Corpus]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the corpora, which is the same for all."""
    return next(iter(corpora.values())).tokenizer


def corpus_fingerprint(corpora: dict[str, Corpus]) -> str | dict[str, str]:
    """Return the fingerprint of a corpus, or of several by name."""
    fingerprints = {name: corpus.fingerprint for name, corpus in corpora.items()}
    return fingerprints if len(fingerprints) > 1 else next(iter(fingerprints.values()))


def trained_on(folder: RunFolder) -> list[str]:
    """Return the fingerprints of a run's corpora from its newest checkpoint that can be read."""
    for step in saved_steps(folder.checkpoints):
        try:
            found = load_facts(folder.checkpoints / folder_name(step))["data fingerprint"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        prints = found.values() if isinstance(found, dict) else [found]
        return [fingerprint for fingerprint in prints if isinstance(fingerprint, str)]
    return []


def prepare_once(
    config: Config,
    console: RunConsole,
    processes: Processes,
    before: Collection[str] = (),
    *,
    stream: bool = False,
) -> dict[str, Corpus]:
    """Prepare the corpora once on every machine, and check that all machines have the same.

    `before` are their fingerprints in the run that is continued; `stream` as for `prepare`.

    Raises:
        DataError: if machines have different corpora.
    """
    with console.stages() as report:
        corpora = processes.first_on_machine(
            lambda: prepare(
                config.data, seed=config.run.seed, report=report, before=before, stream=stream
            )
        )
    here, first = (
        corpus_fingerprint(corpora),
        processes.on_first(lambda: corpus_fingerprint(corpora)),
    )
    if here != first:
        raise DataError(
            f"the corpus of rank {processes.rank} has the fingerprint {here}, that of rank 0 "
            f"{first}; give all machines the same files"
        )
    return corpora


def environment(run: Run) -> dict[str, Any]:
    """Return versions, device, processes and the choices of `auto`, for env.json."""
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
        "precision": dtype_text(run.state.forward.precision),
        "peak_flops": peak_flops(device, run.state.forward.precision),
        "ns_dtype": dtype_text(ns_dtype(device)) if products == "auto" else products,
        "ns_kernel": taken_kernel(config.optimizer.ns_kernel),
        "experts": experts_implementation(run.state.model),
        "routing": run.state.routing.facts(),
        "attention": None if (monitor := run.state.attention) is None else monitor.facts(),
        "transfer": None if run.transfer is None else run.transfer.as_dict(),
        "command": sys.argv,
        **read_provenance(run.folder),
    }
