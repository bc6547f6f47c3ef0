"""Resolve a plan request into configuration, topology, model, placement and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.devices import Device, find_device
from muonscale.lab.estimate.placement import Placement, place
from muonscale.lab.estimate.workload import Workload, make_workload
from muonscale.lab.models.build import meta_model
from muonscale.lab.parallel.topology import Topology, arrange, parse_layout
from muonscale.lab.targets import is_model, resolve_target
from muonscale.lab.training.setup import build_optimizer
from muonscale.optim.rules import ADAMW

LONGEST_DEFAULT = 8192
"""Default maximum of tokens in a sequence, for models with more positions."""

LARGEST_WORLD = 4096


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The arguments of `muonscale plan`."""

    target: str
    """A target as for `muonscale.lab.targets.inspect`."""
    overrides: Sequence[str] = ()
    devices: int | None = None
    layout: str | None = None
    device: str = "h100"
    mfu: float = 0.4
    bandwidth: float | None = None
    """Bytes per second of a rank to other machines; that of the device by default."""
    micro_batch: int | None = None
    """Tokens of a micro-batch."""


@dataclass(frozen=True)
class ResolvedPlan:
    """Everything that a cost estimate depends on."""

    request: PlanRequest
    config: Config
    shape: PreTrainedConfig
    model: PreTrainedModel
    placement: Placement
    adamw: Placement
    """The placement with every parameter on AdamW."""
    workload: Workload
    device: Device
    defaults: tuple[str, ...]
    """Defaults that were assumed."""
    timed: bool
    """Whether the configuration defines the length of the run."""


def resolve(request: PlanRequest) -> ResolvedPlan:
    """Resolve a plan request.

    Raises:
        ConfigError: for an unknown device, or an impossible layout, number or batch.
    """
    if not 0 < request.mfu <= 1:
        raise ConfigError(f"--mfu {request.mfu:g} must be above 0 and at most 1")
    if request.bandwidth is not None and request.bandwidth <= 0:
        raise ConfigError(
            f"--bandwidth {request.bandwidth / 1e9:g} must be above 0 (GB per second)"
        )
    device = find_device(request.device, inter=request.bandwidth)
    config, shape, topology, defaults = _resolve_config(request, device)
    if config.adapter.rank is not None:
        raise ConfigError(
            f"adapter.rank={config.adapter.rank}: plan estimates the training of all weights; give "
            "adapter.rank=null for an upper bound"
        )
    model = meta_model(shape)
    groups = build_optimizer(model, config.optimizer).param_groups
    placement = place(model, groups, topology, device.kind)
    return ResolvedPlan(
        request,
        config,
        shape,
        model,
        placement,
        place(model, groups, topology, device.kind, rule=ADAMW.name),
        make_workload(config, topology, device),
        device,
        defaults,
        timed=not is_model(request.target) or _gives(request, "train.steps", "train.tokens"),
    )


def _gives(request: PlanRequest, *keys: str) -> bool:
    return bool({text.partition("=")[0] for text in request.overrides} & set(keys))


def _resolve_config(
    request: PlanRequest, device: Device
) -> tuple[Config, PreTrainedConfig, Topology, tuple[str, ...]]:
    overrides = list(request.overrides)
    if request.micro_batch is not None:
        overrides.append(f"train.micro_batch_tokens={request.micro_batch}")
    if not is_model(request.target):
        config, shape = resolve_target(request.target, overrides)
        return config, shape, _topology(request, config, device), ()
    length, defaults = _sequence_length(request)
    overrides = [f"data.sequence_length={length}", f"eval.batch_tokens={length}", *overrides]
    batch = [] if _gives(request, "train.batch_tokens") else [f"train.batch_tokens={length}"]
    # The batch of one sequence is preliminary; the micro-batch need not divide it.
    config, shape = resolve_target(request.target, [*batch, *overrides])
    topology = _topology(request, config, device)
    if batch:
        batch = [f"train.batch_tokens={config.train.batch_tokens * topology.data_ranks}"]
        defaults.append(f"{batch[0]}: one sequence per data-parallel rank")
    config, shape = resolve_target(request.target, [*batch, *overrides])
    return config, shape, topology, tuple(defaults)


def _sequence_length(request: PlanRequest) -> tuple[str, list[str]]:
    """Return the tokens of a sequence, and the defaults assumed: the positions of the model."""
    for text in reversed(request.overrides):
        key, _, value = text.partition("=")
        if key == "data.sequence_length":
            return value, []
    overrides = [
        text for text in request.overrides if text.startswith(("model.", "data.tokenizer="))
    ]
    _, shape = resolve_target(request.target, overrides)
    positions = getattr(shape, "max_position_embeddings", None) or LONGEST_DEFAULT
    length = min(LONGEST_DEFAULT, positions)
    return str(length), [f"data.sequence_length={length}: the model's positions, at most 8,192"]


def _topology(request: PlanRequest, config: Config, device: Device) -> Topology:
    """Return the topology of `--layout`, or of the configuration on `--devices`."""
    if request.layout is None:
        number = 1 if request.devices is None else request.devices
        check_world(number, f"--devices {number}")
        return arrange(config.parallel, number, -(-number // device.ranks_per_machine))
    topology = parse_layout(request.layout)
    check_world(topology.world, f"--layout {request.layout}")
    if request.devices not in (None, topology.world):
        raise ConfigError(
            f"--layout {request.layout} has {topology.world} devices, and --devices is "
            f"{request.devices}"
        )
    return topology


def check_world(number: int, option: str) -> None:
    """Refuse a number of devices that is not from 1 to `LARGEST_WORLD`."""
    if not 1 <= number <= LARGEST_WORLD:
        raise ConfigError(f"{option}: {number} devices; accepted: 1 to {LARGEST_WORLD}")
