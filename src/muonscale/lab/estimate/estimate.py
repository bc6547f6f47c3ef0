"""The cost estimate of a configuration on a number of devices.

It is a tree of plain values, printed by `--json`. Text and figure are made from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from muonscale.lab.console import dtype_text
from muonscale.lab.estimate.activations import Activations, activation_bytes
from muonscale.lab.estimate.assumptions import assumptions
from muonscale.lab.estimate.flops import StepFlops, step_flops
from muonscale.lab.estimate.memory import RankMemory, elements, rank_memory
from muonscale.lab.estimate.placement import Placement
from muonscale.lab.estimate.resolve import PlanRequest, ResolvedPlan, resolve
from muonscale.lab.estimate.step_time import RankWork, StepTime, break_even, slower_than, step_time
from muonscale.lab.estimate.traffic import (
    Message,
    OptimizerTraffic,
    activation_flow,
    count_exchanges,
    optimizer_messages,
    shared_messages,
)
from muonscale.lab.models.flops import active_parameters
from muonscale.lab.models.structure import count_parameters
from muonscale.optim.newton_schulz.kernels import taken_kernel

DERIVED = ("gathered_layer", "gradients_stay")
"""Fields of `RankMemory` that are not separate parts."""

PAPERS = {
    "moonlight": {"flops_ratio": 0.52, "source": "Liu et al., arXiv 2502.16982"},
    "essential": {"fewer_tokens": [0.10, 0.15], "source": "arXiv 2505.02222"},
}
"""Published savings of Muon over AdamW."""


def estimate(request: PlanRequest) -> dict[str, Any]:
    """Return the facts of the cost estimate of a configuration; times are in seconds.

    Raises:
        ConfigError: for an unknown device, or an impossible layout, number or batch.
    """
    planned = resolve(request)
    activations = activation_bytes(planned.shape, planned.placement.topology, planned.workload)
    return estimate_plan(planned, activations)


def estimate_plan(planned: ResolvedPlan, activations: Activations) -> dict[str, Any]:
    """Return the facts of the cost estimate of a resolved plan, given its activations."""
    flops = step_flops(planned.shape, planned.model, planned.placement, planned.workload)
    flow = activation_flow(planned.shape, planned.model, planned.placement)
    common = shared_messages(planned.placement, planned.workload, flow)
    exchanges = count_exchanges(planned.placement)
    return {
        "model": _model(planned, flops),
        "layout": _layout(planned),
        "flops": _flops(planned, flops),
        "memory": _memory(planned, activations, flops),
        "traffic": _traffic(planned, common, exchanges),
        "balance": _balance(planned, flops),
        "time": _time(planned, common, exchanges, flops),
        "papers": PAPERS,
        "assumptions": assumptions(planned, activations),
    }


def _model(planned: ResolvedPlan, flops: StepFlops) -> dict[str, Any]:
    size = count_parameters(planned.model)
    return {
        "name": planned.request.target,
        "model_type": planned.shape.model_type,
        "parameters": size.total,
        "without_embeddings": size.without_embeddings,
        "active_without_embeddings": active_parameters(planned.shape, planned.model),
        "mixture_of_experts": bool(planned.placement.stacks),
        "flops_per_token": flops.per_token,
    }


def _layout(planned: ResolvedPlan) -> dict[str, Any]:
    topology, workload = planned.placement.topology, planned.workload
    timeline = planned.config.timeline
    return {
        "devices": topology.world,
        "device": planned.device.name,
        "machines": -(-topology.world // planned.device.ranks_per_machine),
        "layout": str(topology),
        "rule": planned.config.optimizer.rule,
        "sequence_length": workload.sequence_length,
        "batch_tokens": workload.batch_tokens,
        "largest_of": timeline.described_batches if len(timeline.phases) > 1 else None,
        "device_tokens": workload.rank_tokens,
        "micro_batch_tokens": workload.micro_tokens,
        "micro_batches": workload.micro_batches,
        "precision": dtype_text(workload.precision),
        "activation_checkpointing": workload.checkpointing,
    }


def _flops(planned: ResolvedPlan, flops: StepFlops) -> dict[str, Any]:
    step = flops.passes * planned.placement.topology.world
    ns = sum(flops.newton_schulz)
    return {
        "model_per_step": flops.per_token * planned.workload.batch_tokens,
        "devices_per_step": step,
        "newton_schulz_per_step": ns,
        "newton_schulz_share": ns / (ns + step),
        "newton_schulz_dtype": _products_dtype(planned.placement),
        "newton_schulz_kernel": taken_kernel(planned.config.optimizer.ns_kernel),
    }


def _products_dtype(placement: Placement) -> str | None:
    return dtype_text(placement.matrices[0].products_dtype) if placement.matrices else None


def peak_memory(planned: ResolvedPlan, activations: Activations, flops: StepFlops) -> RankMemory:
    """Return the memory of the rank that needs the most.

    The first rank has the largest shards, the busiest one the largest workspace.
    """
    kind = planned.device.kind
    memories = [
        rank_memory(planned.placement, planned.workload, activations, kind, rank)
        for rank in sorted({0, flops.busiest})
    ]
    return max(memories, key=lambda each: each.peak)


def _memory(planned: ResolvedPlan, activations: Activations, flops: StepFlops) -> dict[str, Any]:
    memory = peak_memory(planned, activations, flops)
    device = planned.device.memory
    return {
        "parts": {name: size for name, size in asdict(memory).items() if name not in DERIVED},
        "moments": memory.moments,
        "resident": memory.resident,
        "peak": memory.peak,
        "device": device,
        "fits": memory.peak <= device,
        "activations_plain": activations.plain,
        "activations_checkpointed": activations.checkpointed,
        "advice": None if memory.peak <= device else _advice(planned, memory, activations),
    }


def _advice(planned: ResolvedPlan, memory: RankMemory, activations: Activations) -> str:
    """Return the most effective change, in a line."""
    workload, topology = planned.workload, planned.placement.topology
    if memory.passes >= memory.resident:
        if memory.gathered + memory.unreduced > memory.activations + memory.logits:
            if planned.placement.stacks and topology.expert == 1:
                return "gathered layers need most: shard experts (ep=N), or use fewer shards (hsdp)"
            return "gathered layers need most: divide matrices (tp=N)"
        if workload.micro_tokens > workload.sequence_length:
            return f"activations need most: --micro-batch {workload.sequence_length} or more"
        if not workload.checkpointing and 2 * activations.checkpointed < activations.plain:
            return "activations need most: train.activation_checkpointing=true"
        return "activations and logits need most: divide them (tp=N,sp), or shorten sequences"
    if topology.data == "ddp":
        return "parameters and state need most: shard them (fsdp=N)"
    return "parameters and state need most: use more devices or shards"


def _traffic(
    planned: ResolvedPlan, common: list[Message], exchanges: OptimizerTraffic
) -> dict[str, Any]:
    placement = planned.placement
    ranks = range(placement.topology.world)
    by_rank = [optimizer_messages(placement, exchanges, rank) for rank in ranks]
    sent = [_sent(common) + _sent(own) for own in by_rank]
    received = [_received(common) + _received(own) for own in by_rank]
    busiest = max(ranks, key=lambda rank: max(sent[rank], received[rank]))
    mean: dict[tuple[str, str], int] = defaultdict(int)
    most: dict[tuple[str, str], int] = defaultdict(int)
    for own in by_rank:
        for m in own:
            mean[m.purpose, m.kind] += m.sent
            most[m.purpose, m.kind] = max(most[m.purpose, m.kind], m.sent, m.received)
    rows = [(m.purpose, m.kind, m.sent, m.sent) for m in common]
    rows += [(*key, mean[key] // len(ranks), most[key]) for key in mean]
    columns = ("purpose", "collective", "mean", "busiest")
    return {
        "messages": [dict(zip(columns, row, strict=True)) for row in rows],
        "busiest_sent": sent[busiest],
        "busiest_received": received[busiest],
        "mean_sent": sum(sent) // len(ranks),
    }


def _sent(messages: Sequence[Message]) -> int:
    return sum(message.sent for message in messages)


def _received(messages: Sequence[Message]) -> int:
    return sum(message.received for message in messages)


def _balance(planned: ResolvedPlan, flops: StepFlops) -> dict[str, Any]:
    mean = sum(flops.newton_schulz) / len(flops.newton_schulz)
    assignments = [rank_group.assignment for rank_group in planned.placement.matrices]
    split = {
        (n, t.parameter, t.matrix) for n, p in enumerate(assignments) for t in p.tasks if t.split
    }
    return {
        "busiest_over_mean": max(flops.newton_schulz) / mean if mean else None,
        "matrices": len(
            {(n, t.parameter, t.matrix) for n, p in enumerate(assignments) for t in p.tasks}
        ),
        "split_matrices": len(split),
        "subgroup_size": max((each.subgroup_size for each in assignments), default=1),
        "rounds": max((each.rounds for each in assignments), default=0),
    }


def _time(
    planned: ResolvedPlan, common: list[Message], exchanges: OptimizerTraffic, flops: StepFlops
) -> dict[str, Any]:
    step = _slowest(planned, planned.placement, common, exchanges, flops)
    plain = _slowest(planned, planned.adamw, common, count_exchanges(planned.adamw), flops)
    rate = planned.workload.batch_tokens / step.total
    return {
        "parts": asdict(step),
        "optimizer": step.optimizer,
        "step": step.total,
        "tokens_per_second": rate,
        "adamw_step": plain.total,
        "slower_than_adamw": slower_than(step.total, plain.total),
        "break_even_fewer_steps": break_even(step.total, plain.total),
        "steps": planned.workload.steps if planned.timed else None,
        "hours": planned.workload.tokens / rate / 3600 if planned.timed else None,
    }


def _slowest(
    planned: ResolvedPlan,
    placement: Placement,
    common: list[Message],
    exchanges: OptimizerTraffic,
    flops: StepFlops,
) -> StepTime:
    """Return the step of the slowest rank, assuming the largest FLOPs and the largest traffic."""
    touched = sum(
        placement.touched[name] * elements(sharding, 0)
        for name, sharding in placement.shardings.items()
    )
    work = RankWork(
        flops=flops.passes,
        precision=dtype_text(planned.workload.precision),
        checkpointing=planned.workload.checkpointing,
        ns_flops=max(flops.newton_schulz) if placement.matrices else 0,
        products=_products_dtype(placement) or "float32",
        rounds=max((rank_group.assignment.rounds for rank_group in placement.matrices), default=1),
        touched=touched,
    )
    ranks = [optimizer_messages(placement, exchanges, r) for r in range(placement.topology.world)]
    heaviest = max(ranks, key=lambda own: max(_sent(own), _received(own)))
    return step_time(work, [*common, *heaviest], planned.device, planned.request.mfu)
