"""From what was asked to what is planned: configuration, arrangement, model and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.estimate.devices import Device, find_device
from muonscale.lab.estimate.placement import Placed, place
from muonscale.lab.estimate.workload import Workload, make_workload
from muonscale.lab.models.build import meta_model
from muonscale.lab.parallel.topology import Topology, arrange, parse_layout
from muonscale.lab.targets import is_model, resolve_target
from muonscale.lab.training.setup import build_optimizer
from muonscale.optim.rules import ADAMW

LONGEST_DEFAULT = 8192
"""Tokens of a sequence where a model can have longer ones and nothing else is said."""

LARGEST_WORLD = 4096


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `muonscale plan` is asked."""

    target: str
    """As for `muonscale.lab.targets.inspect`."""
    overrides: Sequence[str] = ()
    devices: int | None = None
    layout: str | None = None
    device: str = "h100"
    mfu: float = 0.4
    bandwidth: float | None = None
    """Bytes per second of a rank to other machines; the device's when not given."""
    micro_batch: int | None = None
    """Tokens."""


@dataclass(frozen=True)
class Planned:
    """What is planned."""

    asked: Asked
    config: Config
    shape: PreTrainedConfig
    model: PreTrainedModel
    placed: Placed
    adamw: Placed
    """The same with every parameter on AdamW."""
    workload: Workload
    device: Device
    defaults: tuple[str, ...]
    """What was not said and is taken so."""
    timed: bool
    """Whether the configuration says how long the run is."""


def resolve(asked: Asked) -> Planned:
    """Return what is planned.

    Raises:
        ConfigError: for a device, a layout, a number or a batch that cannot be.
    """
    if not 0 < asked.mfu <= 1:
        raise ConfigError(f"--mfu {asked.mfu:g}: a part of the peak, above 0 and at most 1")
    if asked.bandwidth is not None and asked.bandwidth <= 0:
        raise ConfigError(
            f"--bandwidth {asked.bandwidth / 1e9:g}: GB per second, above 0 is accepted"
        )
    device = find_device(asked.device, inter=asked.bandwidth)
    config, shape, topology, defaults = _configured(asked, device)
    model = meta_model(shape)
    groups = build_optimizer(model, config.optimizer).param_groups
    placed = place(model, groups, topology, device.kind)
    return Planned(
        asked,
        config,
        shape,
        model,
        placed,
        place(model, groups, topology, device.kind, rule=ADAMW.name),
        make_workload(config, topology, device),
        device,
        defaults,
        timed=not is_model(asked.target) or _gives(asked, "train.steps", "train.tokens"),
    )


def _gives(asked: Asked, *keys: str) -> bool:
    return bool({text.partition("=")[0] for text in asked.overrides} & set(keys))


def _configured(
    asked: Asked, device: Device
) -> tuple[Config, PreTrainedConfig, Topology, tuple[str, ...]]:
    overrides = list(asked.overrides)
    if asked.micro_batch is not None:
        overrides.append(f"train.micro_batch_tokens={asked.micro_batch}")
    if not is_model(asked.target):
        config, shape = resolve_target(asked.target, overrides)
        return config, shape, _topology(asked, config, device), ()
    length, said = _sequence_length(asked)
    overrides = [f"data.sequence_length={length}", f"eval.batch_tokens={length}", *overrides]
    batch = [] if _gives(asked, "train.batch_tokens") else [f"train.batch_tokens={length}"]
    # A micro-batch is of a rank, so that it may not fit the batch of one sequence yet.
    config, shape = resolve_target(asked.target, [*batch, *overrides])
    topology = _topology(asked, config, device)
    if batch:
        batch = [f"train.batch_tokens={config.train.batch_tokens * topology.data_ranks}"]
        said.append(f"{batch[0]}: a sequence for every data-parallel rank")
    config, shape = resolve_target(asked.target, [*batch, *overrides])
    return config, shape, topology, tuple(said)


def _sequence_length(asked: Asked) -> tuple[str, list[str]]:
    """Return the tokens of a sequence, as given or as many as a model has positions."""
    for text in reversed(asked.overrides):
        key, _, value = text.partition("=")
        if key == "data.sequence_length":
            return value, []
    overrides = [text for text in asked.overrides if text.startswith(("model.", "data.tokenizer="))]
    _, shape = resolve_target(asked.target, overrides)
    positions = getattr(shape, "max_position_embeddings", None) or LONGEST_DEFAULT
    length = min(LONGEST_DEFAULT, positions)
    return str(length), [f"data.sequence_length={length}: the model's positions, 8,192 at most"]


def _topology(asked: Asked, config: Config, device: Device) -> Topology:
    """Return the arrangement of `--layout`, or of the configuration on so many devices."""
    if asked.layout is None:
        number = 1 if asked.devices is None else asked.devices
        _check_world(number, f"--devices {number}")
        return arrange(config.parallel, number, -(-number // device.ranks_per_machine))
    topology = parse_layout(asked.layout)
    _check_world(topology.world, f"--layout {asked.layout}")
    if asked.devices not in (None, topology.world):
        raise ConfigError(
            f"--layout {asked.layout} is {topology.world} devices and --devices says "
            f"{asked.devices}; give one of them, or the same number"
        )
    return topology


def _check_world(number: int, what: str) -> None:
    if not 1 <= number <= LARGEST_WORLD:
        raise ConfigError(f"{what}: {number} devices; accepted are 1 to {LARGEST_WORLD}")
