"""What a configuration would cost on so many devices, as one table of facts.

The facts are a tree of plain values, the same that `--json` prints: text and picture are made of it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from muonscale.lab.estimate.activations import Activations, activation_bytes
from muonscale.lab.estimate.assumptions import assumptions
from muonscale.lab.estimate.flops import StepFlops, step_flops
from muonscale.lab.estimate.memory import RankMemory, elements, rank_memory
from muonscale.lab.estimate.placement import Placed
from muonscale.lab.estimate.resolve import Asked, Planned, resolve
from muonscale.lab.estimate.step_time import StepTime, Work, break_even, slower_than, step_time
from muonscale.lab.estimate.traffic import (
    Message,
    Moved,
    flow_of,
    moved,
    optimizer_messages,
    shared_messages,
)
from muonscale.lab.models.flops import active_parameters
from muonscale.lab.models.structure import count_parameters

DERIVED = ("gathered_layer", "gradients_stay")
"""Of the memory of a rank, what is not a part of its own."""

PAPERS = {
    "moonlight": {"flops_ratio": 0.52, "source": "Liu et al., arXiv 2502.16982"},
    "essential": {"fewer_tokens": [0.10, 0.15], "source": "arXiv 2505.02222"},
}
"""What Muon was found to save against AdamW."""


@dataclass(frozen=True)
class Estimate:
    """The facts."""

    facts: dict[str, Any]

    def json(self) -> str:
        """Return them as JSON; bytes are integers, times seconds."""
        return json.dumps(self.facts, indent=2)


def estimate(asked: Asked) -> Estimate:
    """Return what a configuration would cost.

    Raises:
        ConfigError: for a device, a layout, a number or a batch that cannot be.
    """
    planned = resolve(asked)
    activations = activation_bytes(planned.shape, planned.placed.topology, planned.workload)
    return estimate_planned(planned, activations)


def estimate_planned(planned: Planned, activations: Activations) -> Estimate:
    """Return what a plan would cost, its activations counted before."""
    flops = step_flops(planned.shape, planned.model, planned.placed, planned.workload)
    flow = flow_of(planned.shape, planned.model, planned.placed)
    common = shared_messages(planned.placed, planned.workload, flow)
    exchanges = moved(planned.placed)
    facts = {
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
    return Estimate(facts)


def _model(planned: Planned, flops: StepFlops) -> dict[str, Any]:
    size = count_parameters(planned.model)
    return {
        "name": planned.asked.target,
        "model_type": planned.shape.model_type,
        "parameters": size.total,
        "without_embeddings": size.without_embeddings,
        "active_without_embeddings": active_parameters(planned.shape, planned.model),
        "mixture_of_experts": bool(planned.placed.stacks),
        "flops_per_token": flops.per_token,
    }


def _layout(planned: Planned) -> dict[str, Any]:
    topology, workload = planned.placed.topology, planned.workload
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
        "precision": _dtype(workload.precision),
        "activation_checkpointing": workload.checkpointing,
    }


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _flops(planned: Planned, flops: StepFlops) -> dict[str, Any]:
    step = flops.passes * planned.placed.topology.world
    ns = sum(flops.newton_schulz)
    return {
        "model_per_step": flops.per_token * planned.workload.batch_tokens,
        "devices_per_step": step,
        "newton_schulz_per_step": ns,
        "newton_schulz_share": ns / (ns + step),
        "newton_schulz_dtype": _products(planned.placed),
    }


def _products(placed: Placed) -> str | None:
    return _dtype(placed.matrices[0].products) if placed.matrices else None


def _memory(planned: Planned, activations: Activations, flops: StepFlops) -> dict[str, Any]:
    placed, kind = planned.placed, planned.device.kind
    # The first rank has the largest shards; who works most needs most to do so.
    memories = [
        rank_memory(placed, planned.workload, activations, kind, rank)
        for rank in sorted({0, flops.busiest})
    ]
    memory = max(memories, key=lambda each: each.peak)
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


def _advice(planned: Planned, memory: RankMemory, activations: Activations) -> str:
    """Return what would help most, in a line."""
    workload, topology = planned.workload, planned.placed.topology
    if memory.passes >= memory.resident:
        if memory.gathered + memory.unreduced > memory.activations + memory.logits:
            if planned.placed.stacks and topology.expert == 1:
                return "layers take most: deal experts out (ep=N), or shard over fewer ranks (hsdp)"
            return "layers take most: divide matrices (tp=N)"
        if workload.micro_tokens > workload.sequence_length:
            return f"activations take most: --micro-batch {workload.sequence_length} or more"
        if not workload.checkpointing and 2 * activations.checkpointed < activations.plain:
            return "activations take most: train.activation_checkpointing=true"
        return "activations and logits take most: divide them (tp=N,sp), or shorter sequences"
    if topology.data == "ddp":
        return "parameters and state take most: shard them (fsdp=N)"
    return "parameters and state take most: more devices, or shards over more of them"


def _traffic(planned: Planned, common: list[Message], exchanges: Moved) -> dict[str, Any]:
    placed = planned.placed
    ranks = range(placed.topology.world)
    by_rank = [optimizer_messages(placed, exchanges, rank) for rank in ranks]
    sent = [_sent(common) + _sent(own) for own in by_rank]
    received = [_received(common) + _received(own) for own in by_rank]
    busiest = max(ranks, key=lambda rank: max(sent[rank], received[rank]))
    mean: dict[tuple[str, str], int] = defaultdict(int)
    most: dict[tuple[str, str], int] = defaultdict(int)
    for own in by_rank:
        for m in own:
            mean[m.purpose, m.kind] += m.sent
            most[m.purpose, m.kind] = max(most[m.purpose, m.kind], m.sent, m.received)
    rows = [_row(m.purpose, m.kind, m.sent, m.sent) for m in common]
    rows += [_row(*key, mean[key] // len(ranks), most[key]) for key in mean]
    return {
        "messages": rows,
        "busiest_sent": sent[busiest],
        "busiest_received": received[busiest],
        "mean_sent": sum(sent) // len(ranks),
    }


def _row(purpose: str, kind: str, mean: int, busiest: int) -> dict[str, Any]:
    return {"purpose": purpose, "collective": kind, "mean": mean, "busiest": busiest}


def _sent(found: Sequence[Message]) -> int:
    return sum(message.sent for message in found)


def _received(found: Sequence[Message]) -> int:
    return sum(message.received for message in found)


def _balance(planned: Planned, flops: StepFlops) -> dict[str, Any]:
    mean = sum(flops.newton_schulz) / len(flops.newton_schulz)
    plans = [domain.plan for domain in planned.placed.matrices]
    split = {(n, t.parameter, t.matrix) for n, p in enumerate(plans) for t in p.tasks if t.split}
    return {
        "busiest_over_mean": max(flops.newton_schulz) / mean if mean else None,
        "matrices": len({(n, t.parameter, t.matrix) for n, p in enumerate(plans) for t in p.tasks}),
        "split_matrices": len(split),
        "team_size": max((plan.subgroup_size for plan in plans), default=1),
        "rounds": max((plan.rounds for plan in plans), default=0),
    }


def _time(
    planned: Planned, common: list[Message], exchanges: Moved, flops: StepFlops
) -> dict[str, Any]:
    step = _slowest(planned, planned.placed, common, exchanges, flops)
    plain = _slowest(planned, planned.adamw, common, moved(planned.adamw), flops)
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
    planned: Planned, placed: Placed, common: list[Message], exchanges: Moved, flops: StepFlops
) -> StepTime:
    """Return the step of the rank that takes longest: with most to work out, or most to send."""
    work = _work(planned, placed, flops)
    ranks = [optimizer_messages(placed, exchanges, r) for r in range(placed.topology.world)]
    heaviest = max(ranks, key=lambda own: max(_sent(own), _received(own)))
    return step_time(work, [*common, *heaviest], planned.device, planned.asked.mfu)


def _work(planned: Planned, placed: Placed, flops: StepFlops) -> Work:
    touched = sum(
        placed.rules[name].elements_touched * elements(layout, 0)
        for name, layout in placed.layouts.items()
    )
    return Work(
        flops=flops.passes,
        precision=_dtype(planned.workload.precision),
        checkpointing=planned.workload.checkpointing,
        ns_flops=max(flops.newton_schulz) if placed.matrices else 0,
        products=_products(placed) or "float32",
        rounds=max((domain.plan.rounds for domain in placed.matrices), default=1),
        touched=touched,
    )
