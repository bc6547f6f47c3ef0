"""The arrangement of the processes of a run. It needs no process group.

Ranks are numbered along tensor parallelism first, then along the shards of the data-parallel ranks,
then along the replicas. The ranks of expert parallelism are consecutive shards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from muonscale.errors import ConfigError
from muonscale.lab.config.sections import ParallelSection

DataT = Literal["fsdp", "hsdp", "ddp"]

GRAMMAR = "fsdp=N, hsdp=REPLICASxSHARDS or ddp=N, then tp=N, sp, ep=N; such as fsdp=32,tp=2"


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The sizes of all kinds of parallelism."""

    data: DataT = "fsdp"
    replicas: int = 1
    """Number of complete copies of the parameters; each reads different data."""
    shards: int = 1
    """Number of shards of one copy of the parameters; each reads different data."""
    tensor: int = 1
    """Number of ranks that share the matrices of a layer and read the same data."""
    sequence: bool = False
    """Whether these ranks shard the sequence between the matrices."""
    expert: int = 1
    """Number of shards (replicas with ddp) over which routed experts are sharded."""

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        data, tensor, expert = self.data, self.tensor, self.expert
        if self.sequence and tensor == 1:
            raise ConfigError(f"sequence parallelism needs tensor parallelism, which is {tensor}")
        if data == "ddp" and tensor > 1:
            raise ConfigError(
                f"tensor parallelism (here {tensor}) works with fsdp or hsdp, not with ddp"
            )
        if expert == 1:
            return
        if tensor > 1:
            raise ConfigError(
                f"expert parallelism (here {expert}) and tensor parallelism (here {tensor}) "
                "exclude each other; set one of them to 1"
            )
        if data == "hsdp":
            raise ConfigError(
                f"expert parallelism (here {expert}) works with fsdp or ddp, not with hsdp"
            )
        if data == "ddp" and expert != self.data_ranks:
            raise ConfigError(
                f"with ddp experts are sharded over all {self.data_ranks} ranks or none, not over "
                f"{expert}; fsdp accepts any divisor"
            )
        if self.data_ranks % expert:
            raise ConfigError(
                f"expert parallelism {expert} does not divide {self.data_ranks} data-parallel ranks"
            )

    @property
    def data_ranks(self) -> int:
        """Number of ranks, or tensor-parallel groups, that read different data."""
        return self.replicas * self.shards

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.data_ranks * self.tensor

    @property
    def expert_shards(self) -> int:
        """Number of ranks that share the same experts."""
        return self.data_ranks // self.expert

    def data_rank(self, rank: int) -> int:
        """Return the index of the share of the data that a global rank reads."""
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
    """Return the topology that the configuration defines for a number of processes.

    Args:
        section: `parallel.*`.
        world: number of processes.
        machines: number of machines; the default number of replicas of `hsdp`.

    Raises:
        ConfigError: if the processes cannot be arranged in this way.
    """
    data_ranks, rest = divmod(world, section.tensor)
    if rest:
        raise ConfigError(
            f"parallel.tensor={section.tensor} does not divide the {world} processes of this run"
        )
    if section.replicas is not None and section.data != "hsdp":
        raise ConfigError(
            f"parallel.replicas={section.replicas} is only for parallel.data=hsdp, not "
            f"{section.data}"
        )
    replicas = 1
    if section.data == "ddp":
        replicas = data_ranks
    elif section.data == "hsdp":
        replicas = section.replicas if section.replicas is not None else machines
        if data_ranks % replicas:
            raise ConfigError(
                f"parallel.replicas={replicas} does not divide {data_ranks} data-parallel ranks"
            )
    return Topology(
        data=section.data,
        replicas=replicas,
        shards=data_ranks // replicas,
        tensor=section.tensor,
        sequence=section.sequence,
        expert=section.expert,
    )


def parse_layout(text: str) -> Topology:
    """Return the topology of a layout such as `fsdp=32,tp=2`.

    Raises:
        ConfigError: for text of another form, or an impossible topology.
    """
    given: dict[str, str] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(ddp|fsdp|tp|ep)=([1-9]\d*)|(hsdp)=([1-9]\d*x[1-9]\d*)|(sp)", part)
        if match is None:
            raise ConfigError(f"layout {text!r}: {part!r} is not valid; accepted: {GRAMMAR}")
        key, *value = (group for group in match.groups() if group is not None)
        if key in given:
            raise ConfigError(f"layout {text!r} gives {key} twice")
        given[key] = value[0] if value else ""
    kinds = [kind for kind in ("fsdp", "hsdp", "ddp") if kind in given]
    if len(kinds) > 1:
        raise ConfigError(
            f"layout {text!r} has both {kinds[0]} and {kinds[1]}, which exclude each other"
        )
    data: DataT = kinds[0] if kinds else "fsdp"  # type: ignore[assignment]
    sizes = [int(size) for size in given.get(data, "1").split("x")]
    replicas, shards = {"fsdp": (1, sizes[0]), "ddp": (sizes[0], 1)}.get(data) or sizes
    return Topology(
        data=data,
        replicas=replicas,
        shards=shards,
        tensor=int(given.get("tp", 1)),
        sequence="sp" in given,
        expert=int(given.get("ep", 1)),
    )
