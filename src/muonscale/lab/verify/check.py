"""Checks that a layout trains a configured model with the numbers of one process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.config.sections import ParallelSection
from muonscale.lab.models.build import meta_model
from muonscale.lab.parallel.placements import check_model
from muonscale.lab.parallel.processes import Processes, check_alone
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
from muonscale.lab.verify.compare import LayoutComparison, compare
from muonscale.lab.verify.launch import take_steps_on
from muonscale.lab.verify.reordered_run import (
    REORDERINGS,
    reordered_config,
    take_reordered_steps,
)
from muonscale.lab.verify.trajectory import Trajectory, take_steps


@dataclass(frozen=True)
class Verification:
    """Two trajectories and their comparison."""

    config: Config
    """The configuration of both runs."""
    topology: Topology
    precision: torch.dtype
    """The dtype of the forward and backward passes."""
    one: Trajectory
    other: Trajectory
    comparison: LayoutComparison


def verify(config: Config, topology: Topology, steps: int, console: RunConsole) -> Verification:
    """Take the same steps in a layout and in one process, and compare them.

    The corpus is prepared in its cache. Nothing else is written.

    Args:
        config: the configuration of a run; its `parallel` section is ignored.
        topology: the layout, whose processes are started here.
        steps: the number of optimizer steps from the start of the run.
        console: prints messages.

    Raises:
        MuonscaleError: for a model that cannot be trained in this layout or cannot be compared, and
            for a process that fails.
    """
    config = use_float32(config)
    device = resolve_device(config.run.device)
    precision = resolve_precision(config.train, device)
    check_request(config, topology, steps, device)
    corpora = prepare_once(config, console, Processes())
    check_shape(model_shape(config, shared_tokenizer(corpora)), topology)
    console.log(f"{steps} steps on {topology.world} processes ({topology})")
    other = take_steps_on(topology.world, layout_config(config, topology), steps)
    console.log(f"{steps} steps in one process")
    one = take_steps(set_up_alone(config, device), steps)
    console.log(
        f"{steps} steps in one process with other orders of summation, {len(REORDERINGS)} times"
    )
    reordered = [
        take_reordered_steps(set_up_alone(reordered_config(config), device), steps, reordering)
        for reordering in REORDERINGS
    ]
    comparison = compare(one, reordered, other, precision)
    return Verification(config, topology, precision, one, other, comparison)


def use_float32(config: Config) -> Config:
    """Return the configuration with float32 where its dtypes are `auto`.

    In bfloat16 rounding hides differences below a hundredth.
    """
    optimizer, train = config.optimizer, config.train
    if optimizer.ns_dtype == "auto":
        optimizer = optimizer.model_copy(update={"ns_dtype": "float32"})
    if train.precision == "auto":
        train = train.model_copy(update={"precision": "float32"})
    return config.model_copy(update={"optimizer": optimizer, "train": train})


def layout_config(config: Config, topology: Topology) -> Config:
    """Return the configuration for the processes of a layout, with one thread each."""
    parallel = ParallelSection(
        data=topology.data,
        replicas=topology.replicas if topology.data == "hsdp" else None,
        tensor=topology.tensor,
        sequence=topology.sequence,
        expert=topology.expert,
    )
    run = config.run.model_copy(update={"threads": 1})
    return config.model_copy(update={"parallel": parallel, "run": run})


def set_up_alone(config: Config, device: torch.device) -> Run:
    """Set up a fresh run of one process."""
    folder = RunFolder(config.run.path)
    return set_up(config, folder, RunConsole.silent(), Processes(device=device))


def check_request(config: Config, topology: Topology, steps: int, device: torch.device) -> None:
    """Raise ConfigError if the steps cannot be taken in this layout on this machine."""
    check_schedule(config)
    check_shares(config, topology)
    check_alone("verify starts its processes itself")
    if topology.world == 1:
        raise ConfigError(
            f"layout {topology} is one process; give one of several processes, such as fsdp=2"
        )
    if (period := config.optimizer.block_period) > 1:
        raise ConfigError(
            f"optimizer.block_period is {period}, with which the numbers depend on the layout; give "
            "optimizer.block_period=1"
        )
    if steps > config.steps:
        raise ConfigError(f"--steps {steps} is more than the {config.steps} steps of the run")
    if device.type == "cuda" and torch.cuda.device_count() < topology.world:
        raise ConfigError(
            f"layout {topology} needs {topology.world} GPUs, one for each process, but torch finds "
            f"{torch.cuda.device_count()}; give a smaller layout, or run.device=cpu"
        )


def check_shape(shape: PreTrainedConfig, topology: Topology) -> None:
    """Raise ConfigError for a model that does not fit the layout, or that trains with dropout.

    Each rank draws dropout masks for its own share of the batch, so no mask is that of one process.
    Dropout is not set to 0 here, since the verdict would then be about another model.
    """
    check_model(meta_model(shape), topology)
    if fields := random_fields(shape):
        zeros = " ".join(f"model.fields.{name}=0" for name in fields)
        given = ", ".join(f"{name}={value:g}" for name, value in fields.items())
        raise ConfigError(
            f"the model has dropout ({given}), whose masks differ between layouts; give {zeros}"
        )


def random_fields(shape: PreTrainedConfig) -> dict[str, float]:
    """Return the fields of a model that make its training random, with their values."""
    return {
        name: float(value)
        for name, value in shape.to_dict().items()
        if ("drop" in name or "jitter" in name)
        # heads for classification are no part of a language model
        and not name.startswith(("summary", "classifier"))
        and isinstance(value, (int, float))
        and value > 0
    }
