"""Whether a layout trains a configured model with the numbers of one process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.config.sections import ParallelSection
from muonscale.lab.models.build import meta_model
from muonscale.lab.parallel.placements import check_model
from muonscale.lab.parallel.processes import Processes, started_by_torchrun
from muonscale.lab.parallel.topology import Topology
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.micro_batches import check_shares
from muonscale.lab.training.schedule import check_schedule
from muonscale.lab.training.setup import (
    Run,
    model_shape,
    prepare_once,
    resolve_device,
    resolve_precision,
    set_up,
    shared_tokenizer,
)
from muonscale.lab.verify.compare import Comparison, compare
from muonscale.lab.verify.launch import take_steps_on
from muonscale.lab.verify.reordered_run import TWINS, take_twin_steps, twin_config
from muonscale.lab.verify.trajectory import Trajectory, take_steps


@dataclass(frozen=True)
class Verified:
    """What was compared, and what came of it."""

    config: Config
    """As both were run."""
    topology: Topology
    precision: torch.dtype
    """Of the forward and backward passes."""
    one: Trajectory
    other: Trajectory
    comparison: Comparison


def verify(config: Config, topology: Topology, steps: int, console: RunConsole) -> Verified:
    """Take the same steps in a layout and in one process, and compare them.

    The corpus is prepared, in its cache; nothing else is written.

    Args:
        config: of a run, which is taken from its start; its `parallel` section is left aside.
        topology: the layout; as many processes are started here.
        steps: optimizer steps, the first of the run.
        console: where to say what happens.

    Raises:
        MuonscaleError: for what cannot be trained in this layout or cannot be compared, and for a
            process that fails.
    """
    config = comparable(config)
    device = resolve_device(config.run.device)
    precision = resolve_precision(config.train, device)
    check_request(config, topology, steps, device)
    corpora = prepare_once(config, console, Processes())
    check_shape(model_shape(config, shared_tokenizer(corpora)), topology)
    console.log(f"{steps} steps on {topology.world} processes ({topology})")
    other = take_steps_on(topology.world, layout_config(config, topology), steps)
    console.log(f"{steps} steps in one process")
    one = take_steps(alone(config, device), steps)
    console.log(f"{steps} steps in one process with other orders of summation, {len(TWINS)} times")
    twins = [take_twin_steps(alone(twin_config(config), device), steps, twin) for twin in TWINS]
    return Verified(config, topology, precision, one, other, compare(one, twins, other, precision))


def comparable(config: Config) -> Config:
    """Return the configuration with float32 wherever it leaves the dtype of products open.

    In bfloat16 rounding hides what is smaller than a hundredth.
    """
    optimizer, train = config.optimizer, config.train
    if optimizer.ns_dtype == "auto":
        optimizer = optimizer.model_copy(update={"ns_dtype": "float32"})
    if train.precision == "auto":
        train = train.model_copy(update={"precision": "float32"})
    return config.model_copy(update={"optimizer": optimizer, "train": train})


def layout_config(config: Config, topology: Topology) -> Config:
    """Return the configuration of the processes of a layout, each on one thread."""
    parallel = ParallelSection(
        data=topology.data,
        replicas=topology.replicas if topology.data == "hsdp" else None,
        tensor=topology.tensor,
        sequence=topology.sequence,
        expert=topology.expert,
    )
    run = config.run.model_copy(update={"threads": 1})
    return config.model_copy(update={"parallel": parallel, "run": run})


def alone(config: Config, device: torch.device) -> Run:
    """Return a fresh run of one process."""
    folder = RunFolder(config.run.path)
    return set_up(config, folder, RunConsole.silent(), Processes(device=device))


def check_request(config: Config, topology: Topology, steps: int, device: torch.device) -> None:
    """Refuse what cannot be run here.

    Raises:
        ConfigError: naming what is in the way.
    """
    check_schedule(config)
    check_shares(config, topology)
    if started_by_torchrun():
        raise ConfigError(
            f"verify starts its processes itself; this is one of {os.environ['WORLD_SIZE']} of a job. "
            "Start it without torchrun"
        )
    if topology.world == 1:
        raise ConfigError(
            f"layout {topology} is one process: there is nothing to compare it with"
            "; give one of several processes, such as fsdp=2"
        )
    if steps > config.steps:
        raise ConfigError(
            f"--steps {steps} is more than the {config.steps} steps of the run"
            "; give at most so many"
        )
    if device.type == "cuda" and torch.cuda.device_count() < topology.world:
        raise ConfigError(
            f"layout {topology} needs {topology.world} GPUs, one for each process, and torch finds "
            f"{torch.cuda.device_count()} here; accepted: a layout for so many, or run.device=cpu"
        )


def check_shape(shape: PreTrainedConfig, topology: Topology) -> None:
    """Refuse a model that cannot be put in the layout, or that draws random numbers in training.

    Each rank draws for its own share of the batch, so no dropout mask is that of one process. It is
    not set to 0 here: the verdict would be on another model than the one that was given.

    Raises:
        ConfigError: naming what is in the way.
    """
    check_model(meta_model(shape), topology)
    if fields := random_fields(shape):
        zeros = " ".join(f"model.fields.{name}=0" for name in fields)
        raise ConfigError(
            f"a model with dropout draws other masks in every layout, and cannot be compared "
            f"({', '.join(f'{name}={value:g}' for name, value in fields.items())}); "
            f"set them to 0: {zeros}"
        )


def random_fields(shape: PreTrainedConfig) -> dict[str, float]:
    """Return the fields of a model that make its training random, with their values."""
    return {
        name: float(value)
        for name, value in shape.to_dict().items()
        if _is_random(name) and isinstance(value, (int, float)) and value > 0
    }


UNUSED_HEADS: Sequence[str] = ("summary", "classifier")
"""Of models for classification: their dropout is no part of a language model."""


def _is_random(name: str) -> bool:
    return ("drop" in name or "jitter" in name) and not name.startswith(tuple(UNUSED_HEADS))
