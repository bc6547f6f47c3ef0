"""How the processes of a run are arranged; pure, without a process group.

Ranks count along tensor parallelism first, then along the shards of the data-parallel ranks, then
along the replicas. Expert parallelism takes its ranks from the shards: neighbours hold different
experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.config.sections import ParallelSection

DataT = Literal["fsdp", "hsdp", "ddp"]

GRAMMAR = "fsdp=N, hsdp=REPLICASxSHARDS or ddp=N, then tp=N, sp, ep=N; such as fsdp=32,tp=2"


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The arrangement."""

    data: DataT = "fsdp"
    replicas: int = 1
    """Ranks, or groups of ranks, that hold the same parameters and read different data."""
    shards: int = 1
    """Ranks that share one copy of the parameters and read different data."""
    tensor: int = 1
    """Ranks that share the matrices of a layer and read the same data."""
    sequence: bool = False
    """Whether they divide the sequence between these matrices."""
    expert: int = 1
    """Ranks of `shards` (`replicas` under ddp) among which routed experts are dealt out."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def data_ranks(self) -> int:
        """Ranks, or tensor-parallel groups, that read different data."""
        return self.replicas * self.shards

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.data_ranks * self.tensor

    @property
    def expert_shards(self) -> int:
        """Ranks that share the same experts."""
        return self.data_ranks // self.expert

    def data_rank(self, rank: int) -> int:
        """Return which share of the data a global rank reads."""
        return rank // self.tensor

    def __str__(self) -> str:
        sizes = {
            "fsdp": f"fsdp={self.shards}",
            "hsdp": f"hsdp={self.replicas}x{self.shards}",
            "ddp": f"ddp={self.replicas}",
        }
        parts = [] if self.data_ranks == 1 and self.tensor > 1 else [sizes[self.data]]
        parts += [f"tp={self.tensor}"] * (self.tensor > 1) + ["sp"] * self.sequence
        return ",".join([*parts, *[f"ep={self.expert}"] * (self.expert > 1)])


def arrange(section: ParallelSection, world: int, machines: int = 1) -> Topology:
    """Return the arrangement that the configuration asks of so many processes.

    Args:
        section: `parallel.*`.
        world: number of processes.
        machines: that they run on; `hsdp` keeps a replica on each unless told otherwise.

    Raises:
        ConfigError: where the processes cannot be arranged so.
    """
    data_ranks, rest = divmod(world, section.tensor)
    if rest:
        raise ConfigError(
            f"parallel.tensor={section.tensor} does not divide the {world} processes of this run; "
            "give a divisor, or start more with torchrun"
        )
    if section.replicas is not None and section.data != "hsdp":
        raise ConfigError(
            f"parallel.replicas={section.replicas} is for parallel.data=hsdp, and that is {section.data}; leave it out"
        )
    replicas = 1
    if section.data == "ddp":
        replicas = data_ranks
    elif section.data == "hsdp":
        replicas = section.replicas if section.replicas is not None else machines
        if data_ranks % replicas:
            raise ConfigError(
                f"parallel.replicas={replicas} does not divide {data_ranks} data-parallel ranks"
                "; give a divisor"
            )
    return Topology(
        data=section.data,
        replicas=replicas,
        shards=data_ranks // replicas,
        tensor=section.tensor,
        sequence=section.sequence,
        expert=section.expert,
    )


def check_shares(config: Config, topology: Topology) -> None:
    """Refuse batches that the ranks cannot share.

    Raises:
        ConfigError: naming the batch, the micro-batch or the sequence that does not divide.
    """
    length, ranks = config.data.sequence_length, topology.data_ranks
    micro = config.train.micro_batch_tokens
    for phase in config.timeline.phases:
        batch = phase.batch * length
        if phase.batch % ranks:
            raise ConfigError(
                f"train.batch_tokens={batch} is {phase.batch} sequences of {length}, which {ranks} "
                f"data-parallel ranks cannot share evenly; accepted: multiples of {ranks * length}"
            )
        if micro is not None and batch // ranks % micro:
            raise ConfigError(
                f"train.micro_batch_tokens={micro} does not divide the {batch // ranks} tokens that "
                f"each of {ranks} data-parallel ranks has of train.batch_tokens={batch}"
                "; give a divisor"
            )
    if topology.sequence and length % topology.tensor:
        raise ConfigError(
            f"data.sequence_length={length} is not a multiple of parallel.tensor={topology.tensor}, "
            "which sequence parallelism divides it by"
            "; give a multiple, or leave sequence parallelism out"
        )


def parse_layout(text: str) -> Topology:
    """Return the arrangement that a layout such as `fsdp=32,tp=2` names.

    Raises:
        ConfigError: for a text of another form, or an arrangement that cannot be.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(ddp|fsdp|tp|ep)=([1-9]\d*)|(hsdp)=([1-9]\d*x[1-9]\d*)|(sp)", part)
        if match is None:
            raise ConfigError(f"layout {text!r}: {part!r} is not understood; accepted: {GRAMMAR}")
        key, *value = (group for group in match.groups() if group is not None)
        if key in found:
            raise ConfigError(f"layout {text!r} gives {key} twice; give it once")
        found[key] = value[0] if value else ""
    kinds = [kind for kind in ("fsdp", "hsdp", "ddp") if kind in found]
    if len(kinds) > 1:
        raise ConfigError(f"layout {text!r} has both {kinds[0]} and {kinds[1]}; give one of them")
    data: DataT = kinds[0] if kinds else "fsdp"  # type: ignore[assignment]
    sizes = [int(size) for size in found.get(data, "1").split("x")]
    replicas, shards = {"fsdp": (1, sizes[0]), "ddp": (sizes[0], 1)}.get(data) or sizes
    return Topology(
        data=data,
        replicas=replicas,
        shards=shards,
        tensor=int(found.get("tp", 1)),
        sequence="sp" in found,
        expert=int(found.get("ep", 1)),
    )


def _check(topology: Topology) -> None:
    data, tensor, expert = topology.data, topology.tensor, topology.expert
    if topology.sequence and tensor == 1:
        raise ConfigError(
            f"sequence parallelism divides what tensor parallelism shares, and that is {tensor}; give both"
        )
    if data == "ddp" and tensor > 1:
        raise ConfigError(
            f"tensor parallelism (here {tensor}) goes with fsdp or hsdp, not with ddp"
            "; choose one of them, or leave tensor parallelism out"
        )
    if expert == 1:
        return
    if tensor > 1:
        raise ConfigError(
            f"expert parallelism (here {expert}) and tensor parallelism (here {tensor}) do not go "
            "together; set one of them to 1"
        )
    if data == "hsdp":
        raise ConfigError(
            f"expert parallelism (here {expert}) goes with fsdp or ddp, not with hsdp"
            "; choose one of them, or leave expert parallelism out"
        )
    if data == "ddp" and expert != topology.data_ranks:
        raise ConfigError(
            f"under ddp experts are dealt out to all {topology.data_ranks} ranks or to none, got "
            f"{expert}; use fsdp, which takes any divisor"
        )
    if topology.data_ranks % expert:
        raise ConfigError(
            f"expert parallelism {expert} does not divide {topology.data_ranks} data-parallel ranks"
            "; give a divisor"
        )
