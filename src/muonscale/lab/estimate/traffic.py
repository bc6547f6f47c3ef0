"""Bytes that a rank sends and receives in one step, message by message.

Collectives are counted as rings do them: of an all-gather a rank sends its part to each of the other
W - 1, of a reduce-scatter as much, of an all-reduce both. What travels at the start of a run, and
messages of a few bytes (agreement on gradients, norms for clipping, counts of tokens), are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel

from muonscale.lab.estimate.memory import PARAMETER_BYTES, elements, shard_ranks, sharded
from muonscale.lab.estimate.placement import Domain, Placed
from muonscale.lab.estimate.workload import Workload
from muonscale.lab.parallel.placements import sequence_norms, tensor_styles
from muonscale.lab.parallel.topology import Topology
from muonscale.optim.distributed.assignment import OwnerAssignment, Traffic, traffic

KindT = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "team"]
"""`team`: all-reduces and all-gathers of Gram matrices within a team that shares a matrix."""

PurposeT = Literal["parameters", "gradients", "tensor", "experts", "matrices", "partitioned"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one rank sends and receives for one purpose in one step."""

    purpose: PurposeT
    kind: KindT
    sent: int
    """Bytes."""
    received: int
    ranks: int
    """That take part."""
    stride: int
    """How far apart neighbours among them are."""

    def within(self, ranks_per_machine: int) -> bool:
        """Return whether all of them are in one machine."""
        return self.ranks * self.stride <= ranks_per_machine


@dataclass(frozen=True, kw_only=True)
class Flow:
    """What of a model decides how much its activations travel."""

    width: int
    vocabulary: int
    mixtures: int
    """Layers with routed experts."""
    chosen: int
    """Experts that a token goes to in each."""
    readers: int
    """Modules that read activations into tensor-parallel matrices, per model."""
    writers: int
    """Tensor-parallel matrices whose results are summed, per model."""
    norms: frozenset[str]
    """Parameters of norms that see a divided sequence."""


def flow_of(shape: PreTrainedConfig, model: PreTrainedModel, placed: Placed) -> Flow:
    """Return what of a model decides how much its activations travel."""
    topology = placed.topology
    styles = tensor_styles(model) if topology.tensor > 1 else {}
    norms = sequence_norms(model) if topology.sequence else []
    rows = [name for name, style in styles.items() if style == "rows"]
    return Flow(
        width=shape.hidden_size,
        vocabulary=shape.vocab_size,
        mixtures=len({name.rpartition(".")[0] for name in placed.stacks}),
        chosen=getattr(shape, "num_experts_per_tok", None) or 0,
        readers=len({name.rpartition(".")[0] for name in rows}),
        writers=sum(style == "columns" for style in styles.values()),
        norms=frozenset(
            f"{name}.{leaf}"
            for name in norms
            for leaf, _ in model.get_submodule(name).named_parameters()
        ),
    )


def messages(
    placed: Placed, workload: Workload, flow: Flow, moved: Moved, rank: int
) -> list[Message]:
    """Return what a global rank sends and receives in one step."""
    return [
        *shared_messages(placed, workload, flow),
        *optimizer_messages(placed, moved, rank),
    ]


def shared_messages(placed: Placed, workload: Workload, flow: Flow) -> list[Message]:
    """Return those that are alike on all ranks: all but the optimizer's."""
    topology = placed.topology
    found = list(_fsdp(placed, workload)) if sharded(placed) else []
    if topology.data == "ddp" and topology.data_ranks > 1:
        found.append(_ddp(placed, workload))
    if topology.tensor > 1:
        found += _tensor(topology, workload, flow)
        found += _after_backward(placed, flow)
    if topology.expert > 1:
        found.append(_experts(topology, workload, flow))
    return [message for message in found if message.sent]


def optimizer_messages(placed: Placed, moved: Moved, rank: int) -> list[Message]:
    """Return those of the optimizer step on a global rank."""
    found: list[Message] = []
    world = placed.topology.world
    for purpose, domains, exchanges in (
        ("matrices", placed.matrices, moved.matrices),
        ("partitioned", placed.partitioned, moved.partitioned),
    ):
        for domain, exchange in zip(domains, exchanges, strict=True):
            position = domain.position(rank, world)
            stride = world // len(domain.plan.ranks)
            found += _exchanged(purpose, domain, exchange, position, stride)  # type: ignore[arg-type]
    return [message for message in found if message.sent or message.received]


def _fsdp(placed: Placed, workload: Workload) -> Iterator[Message]:
    """Yield all-gathers (twice for layers, once for the rest) and reduce-scatters, per micro-batch."""
    topology, itemsize = placed.topology, workload.precision.itemsize
    for experts in (False, True):
        names = [n for n in placed.layouts if _apart(placed, n) == experts]
        if not names:
            continue
        ranks = shard_ranks(placed, names[0])
        stride = topology.expert if experts else topology.tensor
        part = {name: (ranks - 1) * elements(placed.layouts[name], 0) for name in names}
        twice = sum(count * (2 if placed.units[name] else 1) for name, count in part.items())
        for purpose, kind, count in (
            ("parameters", "all_gather", twice),
            ("gradients", "reduce_scatter", sum(part.values())),
        ):
            nbytes = count * itemsize * workload.micro_batches
            yield _message(purpose, kind, nbytes, ranks, stride)
    if topology.replicas > 1:
        count = sum(elements(layout, 0) for layout in placed.layouts.values())
        nbytes = _ring(count * itemsize, topology.replicas)
        stride = topology.shards * topology.tensor
        yield _message("gradients", "all_reduce", nbytes, topology.replicas, stride)


def _apart(placed: Placed, name: str) -> bool:
    """Return whether FSDP shards a parameter over the ranks that share experts."""
    return placed.topology.expert > 1 and name in placed.stacks


def _ddp(placed: Placed, workload: Workload) -> Message:
    """Return the all-reduce of all gradients but those of experts that are dealt out."""
    ranks = placed.topology.data_ranks
    count = sum(elements(layout, 0) for layout in placed.layouts.values() if layout.replicated)
    nbytes = _ring(count * workload.precision.itemsize, ranks)
    return _message("gradients", "all_reduce", nbytes, ranks, 1)


def _tensor(topology: Topology, workload: Workload, flow: Flow) -> Iterator[Message]:
    """Yield what activations send along the tensor-parallel axis.

    Forward, the results of every writer are summed; backward, the gradients of every reader. The
    embedding's rows are summed forward, the gradients of the head's input backward, and logits are
    gathered. With a divided sequence a sum is a reduce-scatter here and an all-gather there.
    """
    ways, itemsize = topology.tensor, workload.precision.itemsize
    width = workload.rank_tokens * flow.width * itemsize
    logits = workload.rank_tokens * flow.vocabulary * itemsize * (ways - 1) // ways
    again = workload.checkpointing
    if not topology.sequence:
        sums = flow.writers * (1 + again) + flow.readers + 2
        yield _message("tensor", "all_reduce", _ring(sums * width, ways), ways, 1)
        yield _message("tensor", "all_gather", logits, ways, 1)
        return
    step = width * (ways - 1) // ways
    gathers = flow.readers * (1 + again) + flow.writers + 2
    scatters = flow.readers + flow.writers * (1 + again) + 1
    yield _message("tensor", "all_gather", gathers * step + logits, ways, 1)
    yield _message("tensor", "reduce_scatter", scatters * step, ways, 1)
    yield _message("tensor", "all_reduce", _ring(width, ways), ways, 1)


def _after_backward(placed: Placed, flow: Flow) -> Iterator[Message]:
    """Yield the sums of gradients that every tensor-parallel rank has a part of, once a step."""
    ways = placed.topology.tensor
    names = placed.partial | flow.norms
    count = sum(elements(placed.layouts[name], 0) for name in names)
    yield _message("tensor", "all_reduce", _ring(count * PARAMETER_BYTES, ways), ways, 1)


def _experts(topology: Topology, workload: Workload, flow: Flow) -> Message:
    """Return the way of every token to its experts and back, forward and backward."""
    ways = topology.expert
    copies = workload.rank_tokens * flow.chosen * flow.mixtures
    trips = 4 + 2 * workload.checkpointing
    nbytes = trips * copies * flow.width * workload.precision.itemsize * (ways - 1) // ways
    return _message("experts", "all_to_all", nbytes, ways, 1)


@dataclass(frozen=True)
class Moved:
    """What all ranks exchange for the optimizer, by domain."""

    matrices: tuple[Exchanged, ...]
    partitioned: tuple[Exchanged, ...]


@dataclass(frozen=True)
class Exchanged:
    """Elements that the ranks of a domain exchange."""

    pieces: Traffic
    """In rounds where every rank sends others what they hold."""
    to_all: int
    """Sent by every rank, padded, in rounds where all of them hold all of it."""


def moved(placed: Placed) -> Moved:
    """Return what the domains exchange; seconds for thousands of ranks."""
    return Moved(
        tuple(_exchange(domain.plan) for domain in placed.matrices),
        tuple(_exchange(domain.plan) for domain in placed.partitioned),
    )


def _exchange(plan: OwnerAssignment) -> Exchanged:
    """Return what the ranks of a plan exchange, as `muonscale.optim.distributed.exchange` does it."""
    shared = {
        task.round
        for task in plan.tasks
        if task.split is not None or not plan.parameters[task.parameter].sharding.replicated
    }
    sizes: dict[int, list[int]] = {
        number: [0] * len(plan.ranks) for number in range(plan.rounds) if number not in shared
    }
    for task in plan.tasks:
        if task.round in sizes:
            sizes[task.round][task.owner] += math.prod(task.shape)
    to_all = sum((len(plan.ranks) - 1) * max(each) for each in sizes.values())
    rest = replace(plan, tasks=tuple(task for task in plan.tasks if task.round in shared))
    return Exchanged(traffic(rest), to_all)


def _exchanged(
    purpose: PurposeT, domain: Domain, exchange: Exchanged, position: int, stride: int
) -> Iterator[Message]:
    pieces, itemsize, ranks = exchange.pieces, domain.wire.itemsize, len(domain.plan.ranks)
    yield Message(
        purpose=purpose,
        kind="all_to_all",
        sent=itemsize * (pieces.sent_in[position] + pieces.sent_out[position]),
        received=itemsize * (pieces.received_in[position] + pieces.received_out[position]),
        ranks=ranks,
        stride=stride,
    )
    yield _message(purpose, "all_gather", itemsize * exchange.to_all, ranks, stride)
    team = PARAMETER_BYTES * pieces.shared[position]
    yield _message(purpose, "team", team, domain.plan.subgroup_size, stride)


def _ring(nbytes: int, ranks: int) -> int:
    """Return what a rank sends of an all-reduce of so many bytes."""
    return 2 * (ranks - 1) * nbytes // ranks


def _message(purpose: str, kind: str, nbytes: int, ranks: int, stride: int) -> Message:
    return Message(
        purpose=purpose,  # type: ignore[arg-type]
        kind=kind,  # type: ignore[arg-type]
        sent=nbytes,
        received=nbytes,
        ranks=ranks,
        stride=stride,
    )


def bytes_by_kind(found: list[Message]) -> dict[str, int]:
    """Return the bytes sent, by kind of collective."""
    kinds: dict[str, int] = {}
    for message in found:
        kinds[message.kind] = kinds.get(message.kind, 0) + message.sent
    return kinds
