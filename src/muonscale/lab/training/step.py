"""One training step: forward, backward, clip, schedule, optimizer, and what there is to say of it.

The ranks of a run take it together; each has its share of the batch, in micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from muonscale.lab.config.load import Config
from muonscale.lab.data.loss_mask import count_targets, unpack
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.attention import AttentionWatch
from muonscale.lab.training.gradients import clip_gradients, gradient_norms
from muonscale.lab.training.microbatch_grads import PartLengths, part_size
from muonscale.lab.training.router_balance import Routing
from muonscale.lab.training.schedule import apply_multiplier, multiplier
from muonscale.lab.training.state import TrainState
from muonscale.optim.muon import Muon


def next_token_loss(
    forward: Parallelized, batch_BL: Tensor, targets: float | None = None
) -> Tensor:
    """Return the mean cross entropy of the next tokens, in nats.

    Args:
        forward: a causal language model.
        batch_BL: token ids, int64 [batch, length + 1]: inputs and, shifted by one, targets.
        targets: of marked rows, what their summed cross entropy is divided by; None for plain ids.
    """
    if targets is not None:
        rows = unpack(batch_BL)
        logits_BLV = forward.logits(rows.inputs_BL, rows.positions_BL)
        total = F.cross_entropy(
            logits_BLV.flatten(0, 1).float(), rows.targets_BL.flatten(), reduction="sum"
        )
        return total / targets
    logits_BLV = forward.logits(batch_BL[:, :-1])
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), batch_BL[:, 1:].flatten())


def accumulate(
    forward: Parallelized,
    routing: Routing,
    batch_BL: Tensor,
    micro_batch: int,
    *,
    targets: float | None = None,
    attention: AttentionWatch | None = None,
    lengths: PartLengths | None = None,
) -> Tensor:
    """Add the gradients of the mean loss over the batches of all ranks, and return this rank's loss.

    A collective of all ranks. Gradients are those of one process that reads all the batches at once;
    an auxiliary loss is in the gradients and not in the loss.

    Args:
        forward: the model on the ranks.
        routing: hears its routers.
        batch_BL: this rank's share, int64 [batch, length + 1], as large on every rank.
        micro_batch: sequences that go through the model at a time, a divisor of the batch.
        targets: of marked rows, how many this rank would have if all ranks had as many.
        attention: hears it, if it is to be heard.
        lengths: measures the gradient of every micro-batch, if they are to be measured.
    """
    parts = batch_BL.split(micro_batch)
    each = None if targets is None else targets / len(parts)
    losses = []
    routing.begin()
    for number, part in enumerate(parts, 1):
        complete = lengths is not None or number == len(parts)
        with nullcontext() if lengths is None else lengths.apart():
            with forward.micro_batch(last=complete):
                hearing = nullcontext() if attention is None else attention.listening()
                with routing.listening(), hearing:
                    loss = next_token_loss(forward, part, each)
                (routing.objective(loss, len(part)) / len(parts)).backward()
            if complete:
                forward.complete_gradients()
        losses.append(loss.detach() / len(parts))
    return torch.stack(losses).sum()


def train_step(
    state: TrainState,
    batch: np.ndarray,
    config: Config,
    processes: Processes,
    *,
    before_update: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Take one step and return its metrics record: a collective of all ranks.

    Args:
        state: model, optimizer and position; changed by the step.
        batch: token ids, marked where data.format is chat, [batch, length + 1]: this rank's share.
        config: micro-batches, clipping and schedule are read from it.
        processes: this one and the others.
        before_update: called when the gradients are there and the weights are still the old ones.
    """
    start = time.perf_counter()
    optimizer, device = state.optimizer, processes.device
    seed_step(config.run.seed, state.step, processes.data_rank)
    optimizer.zero_grad()
    if (attention := state.attention) is not None:
        attention.begin(state.step)
    targets = targets_in_all(batch, config, processes)
    lengths, micro_batch = _parts(state, len(batch), config, processes)
    with record_function("muonscale/forward+backward"):
        loss = accumulate(
            state.forward,
            state.routing,
            torch.from_numpy(batch).to(device),
            micro_batch,
            targets=None if targets is None else targets / processes.topology.data_ranks,
            attention=attention,
            lengths=lengths,
        )
    norms = _clipped(optimizer, config, processes)
    apply_multiplier(optimizer, multiplier(config.schedule, state.step, config.timeline))
    if before_update is not None:
        before_update()
    before = _now(device)
    with record_function("muonscale/optimizer"):
        optimizer.step()
    optimizer_seconds = _now(device) - before
    routing = state.routing.finish(state.step, processes)
    heard = {} if attention is None else attention.finish(optimizer, processes)
    state.step += 1
    (loss_value,) = processes.sum(loss / processes.topology.data_ranks)
    return {
        "kind": "train",
        "step": state.step,
        "tokens": config.timeline.tokens_before(state.step),
        "loss": loss_value,
        **({} if targets is None else {"targets": targets}),
        **_of_the_optimizer(state, norms),
        **_speed(state.step - 1, config, time.perf_counter() - start),
        "optimizer_ms": optimizer_seconds * 1000,
        **({"routing": routing} if routing else {}),
        **heard,
        **_noise_scale(state, config, lengths, norms),
    }


def _clipped(optimizer: Muon, config: Config, processes: Processes) -> dict[str, Tensor]:
    """Clip the gradients as configured; return their norms before, by group."""
    section = config.optimizer
    with record_function("muonscale/gradients"):
        norms = gradient_norms(optimizer, processes)
        if section.max_grad_norm is not None:
            clip_gradients(optimizer, norms, max_norm=section.max_grad_norm, clip=section.clip)
    return norms


def _parts(
    state: TrainState, sequences: int, config: Config, processes: Processes
) -> tuple[PartLengths | None, int]:
    """Return what measures the parts of a rank's share of the batch, if it is due, and their size."""
    micro_batch = config.micro_batch_sequences or sequences
    if not config.telemetry.noise_scale_due(state.step):
        return None, micro_batch
    return PartLengths(state.optimizer, processes), part_size(sequences, micro_batch)


def _noise_scale(
    state: TrainState, config: Config, lengths: PartLengths | None, norms: dict[str, Tensor]
) -> dict[str, Any]:
    """Return what the lengths of the gradient, before clipping, and of its parts say of the last step."""
    if lengths is None:
        return {}
    tokens = config.timeline.batch_at(state.step - 1) * config.data.sequence_length
    whole_sq = sum(norm.item() ** 2 for norm in norms.values())
    found = state.noise_scale.measure(
        lengths.mean_square(), whole_sq, small=tokens // lengths.count, big=tokens
    )
    return {"noise_scale": found}


def _of_the_optimizer(state: TrainState, norms: dict[str, Tensor]) -> dict[str, Any]:
    """Return learning rates, lengths of gradients and updates, and what was out of the ordinary."""
    stats = state.optimizer.stats()
    lengths = {name: norm.item() for name, norm in norms.items()}
    update_rms = float(stats["update_rms"])
    whole = math.hypot(*lengths.values())
    return {
        "lr": {group["name"]: group["lr"] for group in state.optimizer.param_groups},
        "grad_norm": lengths,
        "update_rms": update_rms,
        "spikes": state.spikes.add({"grad_norm": whole, "update_rms": update_rms}),
        "skipped_steps": stats["skipped_steps"],
    }


def _speed(step: int, config: Config, seconds: float) -> dict[str, float]:
    tokens = config.timeline.batch_at(step) * config.data.sequence_length
    return {"tokens_per_second": tokens / seconds, "step_ms": seconds * 1000}


def targets_in_all(batch: np.ndarray, config: Config, processes: Processes) -> int | None:
    """Return the targets of all ranks' shares of a batch, None where every token is one: a collective.

    Rows of chats have different numbers of them, and all weigh the same.
    """
    if not config.data.has_chats:
        return None
    (total,) = processes.sum(count_targets(batch))
    return round(total)


def seed_step(seed: int, step: int, data_rank: int) -> None:
    """Make what a step draws (dropout) depend on these alone: a resumed run draws the same.

    Ranks that read the same data draw the same.
    """
    sequence = np.random.SeedSequence([seed, step, data_rank])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)


def _now(device: torch.device) -> float:
    """Return the time at which all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
