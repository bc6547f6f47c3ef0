"""Bytes that a rank sends and receives in one step, by message.

Collectives are assumed to be rings: in an all-gather a rank sends its part to each of the other
W - 1 ranks, in a reduce-scatter the same, in an all-reduce both. Messages at the start of a run,
and messages of a few bytes (agreement on gradients, norms for clipping, counts of tokens), are left
out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel

from muonscale.lab.estimate.memory import PARAMETER_BYTES, elements, shard_ranks, sharded
from muonscale.lab.estimate.placement import Placement, RankGroupPlan
from muonscale.lab.estimate.workload import Workload
from muonscale.lab.models.structure import parameters_of
from muonscale.lab.parallel.placements import sequence_norms, tensor_styles
from muonscale.lab.parallel.topology import Topology
from muonscale.optim.distributed.assignment import Traffic, row_traffic, traffic

KindT = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "subgroup"]
"""`subgroup`: all-reduces and all-gathers of Gram matrices in a subgroup that shares a matrix."""

PurposeT = Literal["parameters", "gradients", "tensor", "experts", "matrices", "partitioned"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """The traffic of one rank for one purpose in one step."""

    purpose: PurposeT
    kind: KindT
    sent: int
    """Bytes sent."""
    received: int
    """Bytes received."""
    ranks: int
    """Number of ranks that take part."""
    stride: int
    """Distance between consecutive ranks."""

    def within(self, ranks_per_machine: int) -> bool:
        """Return whether all ranks are on one machine."""
        return self.ranks * self.stride <= ranks_per_machine


@dataclass(frozen=True, kw_only=True)
class ActivationFlow:
    """Properties of a model that determine the traffic of its activations."""

    width: int
    vocabulary: int
    mixtures: int
    """Number of layers with routed experts."""
    chosen: int
    """Experts per token in each of them."""
    readers: int
    """Number of modules that pass activations to tensor-parallel matrices."""
    writers: int
    """Number of tensor-parallel matrices whose results are summed."""
    norms: frozenset[str]
    """Parameters of norms that get a sharded sequence."""


def activation_flow(
    shape: PreTrainedConfig, model: PreTrainedModel, placement: Placement
) -> ActivationFlow:
    """Return the properties of a model that determine the traffic of its activations."""
    topology = placement.topology
    styles = tensor_styles(model) if topology.tensor > 1 else {}
    norms = sequence_norms(model) if topology.sequence else []
    rows = [name for name, style in styles.items() if style == "rows"]
    return ActivationFlow(
        width=shape.hidden_size,
        vocabulary=shape.vocab_size,
        mixtures=len({name.rpartition(".")[0] for name in placement.stacks}),
        chosen=getattr(shape, "num_experts_per_tok", None) or 0,
        readers=len({name.rpartition(".")[0] for name in rows}),
        writers=sum(style == "columns" for style in styles.values()),
        norms=parameters_of(model, norms),
    )


def shared_messages(
    placement: Placement, workload: Workload, flow: ActivationFlow
) -> list[Message]:
    """Return the messages that are equal on all ranks: all but the optimizer's."""
    topology = placement.topology
    result = list(_fsdp(placement, workload)) if sharded(placement) else []
    if topology.data == "ddp" and topology.data_ranks > 1:
        # All gradients but those of sharded experts.
        count = sum(elements(s, 0) for s in placement.shardings.values() if s.replicated)
        nbytes = _ring_all_reduce(count * workload.precision.itemsize, topology.data_ranks)
        result.append(_message("gradients", "all_reduce", nbytes, topology.data_ranks, 1))
    if topology.tensor > 1:
        result += _tensor(topology, workload, flow)
        # Gradients that every tensor-parallel rank has a part of, once a step.
        names = placement.partial | flow.norms
        count = sum(elements(placement.shardings[name], 0) for name in names)
        nbytes = _ring_all_reduce(count * PARAMETER_BYTES, topology.tensor)
        result.append(_message("tensor", "all_reduce", nbytes, topology.tensor, 1))
    if topology.expert > 1:
        # Every token is sent to its experts and back, forward and backward.
        ways = topology.expert
        copies = workload.rank_tokens * flow.chosen * flow.mixtures
        trips = 4 + 2 * workload.checkpointing
        nbytes = trips * copies * flow.width * workload.precision.itemsize * (ways - 1) // ways
        result.append(_message("experts", "all_to_all", nbytes, ways, 1))
    return [message for message in result if message.sent]


def optimizer_messages(
    placement: Placement, exchanges: OptimizerTraffic, rank: int
) -> list[Message]:
    """Return the messages of the optimizer step on a global rank."""
    result: list[Message] = []
    world = placement.topology.world
    for purpose, rank_groups, traffics in (
        ("matrices", placement.matrices, exchanges.matrices),
        ("partitioned", placement.partitioned, exchanges.partitioned),
    ):
        for rank_group, exchange in zip(rank_groups, traffics, strict=True):
            position = rank_group.group_rank(rank, world)
            stride = world // len(rank_group.assignment.ranks)
            result += _exchange_messages(purpose, rank_group, exchange, position, stride)  # type: ignore[arg-type]
    return [message for message in result if message.sent or message.received]


def _fsdp(placement: Placement, workload: Workload) -> Iterator[Message]:
    """Yield all-gathers (two for layers, one for the rest) and reduce-scatters, per micro-batch."""
    topology, itemsize = placement.topology, workload.precision.itemsize
    for experts in (False, True):
        names = [
            name
            for name in placement.shardings
            if (topology.expert > 1 and name in placement.stacks) == experts
        ]
        if not names:
            continue
        ranks = shard_ranks(placement, names[0])
        stride = topology.expert if experts else topology.tensor
        part = {name: (ranks - 1) * elements(placement.shardings[name], 0) for name in names}
        twice = sum(count * (2 if placement.units[name] else 1) for name, count in part.items())
        for purpose, kind, count in (
            ("parameters", "all_gather", twice),
            ("gradients", "reduce_scatter", sum(part.values())),
        ):
            nbytes = count * itemsize * workload.micro_batches
            yield _message(purpose, kind, nbytes, ranks, stride)
    if topology.replicas > 1:
        count = sum(elements(layout, 0) for layout in placement.shardings.values())
        nbytes = _ring_all_reduce(count * itemsize, topology.replicas)
        stride = topology.shards * topology.tensor
        yield _message("gradients", "all_reduce", nbytes, topology.replicas, stride)


def _tensor(topology: Topology, workload: Workload, flow: ActivationFlow) -> Iterator[Message]:
    """Yield the traffic of activations along the tensor-parallel axis.

    The forward pass sums the results of every writer, the backward pass the gradients of every
    reader. The embedding's rows are summed forward, the gradients of the head's input backward, and
    logits are gathered. With a sharded sequence a sum is a reduce-scatter and a later all-gather.
    """
    ways, itemsize = topology.tensor, workload.precision.itemsize
    width = workload.rank_tokens * flow.width * itemsize
    logits = workload.rank_tokens * flow.vocabulary * itemsize * (ways - 1) // ways
    again = workload.checkpointing
    if not topology.sequence:
        sums = flow.writers * (1 + again) + flow.readers + 2
        yield _message("tensor", "all_reduce", _ring_all_reduce(sums * width, ways), ways, 1)
        yield _message("tensor", "all_gather", logits, ways, 1)
        return
    step = width * (ways - 1) // ways
    gathers = flow.readers * (1 + again) + flow.writers + 2
    scatters = flow.readers + flow.writers * (1 + again) + 1
    yield _message("tensor", "all_gather", gathers * step + logits, ways, 1)
    yield _message("tensor", "reduce_scatter", scatters * step, ways, 1)
    yield _message("tensor", "all_reduce", _ring_all_reduce(width, ways), ways, 1)


@dataclass(frozen=True)
class OptimizerTraffic:
    """The exchanges of the optimizer, by rank group."""

    matrices: tuple[ExchangeTraffic, ...]
    partitioned: tuple[ExchangeTraffic, ...]


@dataclass(frozen=True)
class ExchangeTraffic:
    """Elements that the ranks of a rank group exchange."""

    pieces: Mapping[int, Traffic]
    """Elements in rounds in which ranks send each other parts of matrices, by the number of steps
    in one of which they do."""
    rows: Traffic
    """Values of per-row state that are exchanged with the matrices."""
    to_all: int
    """Elements that every rank sends, with padding, in rounds with all-gathers of replicated
    ones."""


def count_exchanges(placement: Placement) -> OptimizerTraffic:
    """Return the exchanges of all rank groups. It takes seconds for thousands of ranks."""
    return OptimizerTraffic(
        tuple(map(_exchange, placement.matrices)), tuple(map(_exchange, placement.partitioned))
    )


def _exchange(rank_group: RankGroupPlan) -> ExchangeTraffic:
    """Return the traffic of a rank group; see `muonscale.optim.distributed.exchange`."""
    assignment = rank_group.assignment
    shared = {
        task.round
        for task in assignment.tasks
        if task.split is not None or not assignment.parameters[task.parameter].sharding.replicated
    }
    sizes: dict[int, list[int]] = {
        number: [0] * len(assignment.ranks)
        for number in range(assignment.rounds)
        if number not in shared
    }
    for task in assignment.tasks:
        if task.round in sizes:
            sizes[task.round][task.owner] += math.prod(task.shape)
    to_all = sum((len(assignment.ranks) - 1) * max(each) for each in sizes.values())
    pieces = {
        period: traffic(
            replace(
                assignment,
                tasks=tuple(
                    task
                    for task in assignment.tasks
                    if task.round in shared and rank_group.periods[task.parameter] == period
                ),
            )
        )
        for period in sorted(set(rank_group.periods))
    }
    return ExchangeTraffic(pieces, row_traffic(assignment, rank_group.row_states), to_all)


def _exchange_messages(
    purpose: PurposeT,
    rank_group: RankGroupPlan,
    exchange: ExchangeTraffic,
    position: int,
    stride: int,
) -> Iterator[Message]:
    pieces, rows = exchange.pieces, exchange.rows
    itemsize, ranks = rank_group.comm_dtype.itemsize, len(rank_group.assignment.ranks)
    each = itemsize  # State is float32. Partitioned state stays with its owner.
    if not any(p.sharding.partitioned for p in rank_group.assignment.parameters):
        each += PARAMETER_BYTES * rank_group.element_states
    yield Message(
        purpose=purpose,
        kind="all_to_all",
        sent=PARAMETER_BYTES * rows.sent(position)
        + sum(each * part.sent(position) // period for period, part in pieces.items()),
        received=PARAMETER_BYTES * rows.received(position)
        + sum(each * part.received(position) // period for period, part in pieces.items()),
        ranks=ranks,
        stride=stride,
    )
    yield _message(purpose, "all_gather", itemsize * exchange.to_all, ranks, stride)
    shared = PARAMETER_BYTES * sum(
        part.shared[position] // period for period, part in pieces.items()
    )
    sums = _ring_all_reduce(4 * PARAMETER_BYTES * rank_group.row_sums, ranks)
    yield _message(purpose, "all_reduce", sums, ranks, stride)
    yield _message(purpose, "subgroup", shared, rank_group.assignment.subgroup_size, stride)


def _ring_all_reduce(nbytes: int, ranks: int) -> int:
    """Return the bytes that a rank sends in an all-reduce of `nbytes`."""
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
