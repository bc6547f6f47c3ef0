"""One training step: forward, backward, clip, schedule, optimizer, and its metrics record.

All ranks of a run take a step together. Each processes its share of the batch in micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from muonscale.lab.config.load import Config
from muonscale.lab.data.loss_mask import count_targets, unpack
from muonscale.lab.models.loss import summed_loss
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.attention import AttentionMonitor
from muonscale.lab.training.gradients import clip_gradients, gradient_norms
from muonscale.lab.training.micro_batches import micro_batch_size
from muonscale.lab.training.noise_scale import MicroBatchNorms
from muonscale.lab.training.router_balance import RouterBalance
from muonscale.lab.training.schedule import apply_multiplier, multiplier
from muonscale.lab.training.state import TrainState


def next_token_loss(
    forward: Parallelized, batch_BL: Tensor, targets: float | None = None
) -> Tensor:
    """Return the mean cross entropy of the next tokens, in nats.

    Args:
        forward: a causal language model.
        batch_BL: token ids, int64 [batch, length + 1]: inputs and, shifted by one, targets.
        targets: divisor of the summed cross entropy of masked rows; None for plain token ids.
    """
    if targets is not None:
        rows = unpack(batch_BL)
        logits_BLV = forward.logits(rows.inputs_BL, rows.positions_BL)
        return summed_loss(logits_BLV, rows.targets_BL) / targets
    logits_BLV, targets_BL = forward.logits(batch_BL[:, :-1]), batch_BL[:, 1:]
    return summed_loss(logits_BLV, targets_BL) / targets_BL.numel()


def accumulate(
    forward: Parallelized,
    routing: RouterBalance,
    batch_BL: Tensor,
    micro_batch: int,
    *,
    targets: float | None = None,
    attention: AttentionMonitor | None = None,
    norms: MicroBatchNorms | None = None,
) -> Tensor:
    """Add the gradients of the mean loss over the batches of all ranks; return this rank's loss.

    A collective of all ranks. The gradients equal those of one process that reads all the batches.
    An auxiliary loss is part of the gradients and not of the returned loss.

    Args:
        forward: the model on the ranks.
        routing: records the decisions of the routers.
        batch_BL: this rank's share, int64 [batch, length + 1], of the same size on every rank.
        micro_batch: sequences that go through the model at a time, a divisor of the batch.
        targets: for masked rows, the mean number of targets per rank.
        attention: records attention logits, if enabled.
        norms: measures the gradient of every micro-batch, if enabled.
    """
    micro_batches = batch_BL.split(micro_batch)
    each = None if targets is None else targets / len(micro_batches)
    losses = []
    routing.begin()
    for number, rows_BL in enumerate(micro_batches, 1):
        complete = norms is not None or number == len(micro_batches)
        with nullcontext() if norms is None else norms.measure():
            with forward.micro_batch(last=complete):
                with routing.record(), nullcontext() if attention is None else attention.record():
                    loss = next_token_loss(forward, rows_BL, each)
                (routing.objective(loss, len(rows_BL)) / len(micro_batches)).backward()
            if complete:
                forward.complete_gradients()
        losses.append(loss.detach() / len(micro_batches))
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
        batch: token ids [batch, length + 1], masked if data.format is chat: this rank's share.
        config: the configuration of the run.
        processes: the processes of the run.
        before_update: called after the gradients are computed and before the weights change.
    """
    start = time.perf_counter()
    optimizer, device, section = state.optimizer, processes.device, config.optimizer
    seed_step(config.run.seed, state.step, processes.data_rank)
    optimizer.zero_grad()
    if (attention := state.attention) is not None:
        attention.begin(state.step)
    targets = count_batch_targets(batch, config, processes)
    noise_due = config.telemetry.noise_scale_due(state.step)
    micro_norms = MicroBatchNorms(optimizer, processes) if noise_due else None
    with record_function("muonscale/forward+backward"):
        loss = accumulate(
            state.forward,
            state.routing,
            to_device(batch, device),
            micro_batch_size(config, len(batch), at_least_two=noise_due),
            targets=None if targets is None else targets / processes.topology.data_ranks,
            attention=attention,
            norms=micro_norms,
        )
    with record_function("muonscale/gradients"):
        norms = gradient_norms(optimizer, processes)
        if section.max_grad_norm is not None:
            clip_gradients(optimizer, norms, max_norm=section.max_grad_norm, clip=section.clip)
    apply_multiplier(optimizer, multiplier(config.schedule, state.step, config.timeline))
    if state.options is not None:
        state.options.set(state.step)
    if before_update is not None:
        before_update()
    before = _mark(device)
    with record_function("muonscale/optimizer"):
        optimizer.step()
    after = _mark(device)
    routing = state.routing.finish(state.step, processes)
    attention_metrics = {} if attention is None else attention.finish(optimizer, processes)
    tokens = config.timeline.batch_at(state.step) * config.data.sequence_length
    state.step += 1
    (loss_value,) = processes.sum(loss / processes.topology.data_ranks)
    stats = optimizer.stats()
    norm_values = {name: norm.item() for name, norm in norms.items()}
    grad_norm, update_rms = math.hypot(*norm_values.values()), float(stats["update_rms"])
    spikes = state.spikes.add({"grad_norm": grad_norm, "update_rms": update_rms})
    seconds = time.perf_counter() - start
    record = {
        "kind": "train",
        "step": state.step,
        "tokens": config.timeline.tokens_before(state.step),
        "loss": loss_value,
        **({} if targets is None else {"targets": targets}),
        "lr": {group["name"]: group["lr"] for group in optimizer.param_groups},
        **({} if state.options is None else {"options": state.options.current()}),
        "grad_norm": norm_values,
        "update_rms": update_rms,
        "spikes": spikes,
        "skipped_steps": stats["skipped_steps"],
        "tokens_per_second": tokens / seconds,
        "step_ms": seconds * 1000,
        "optimizer_ms": _seconds_between(before, after) * 1000,
        **({"routing": routing} if routing else {}),
        **attention_metrics,
    }
    if micro_norms is not None:
        record["noise_scale"] = state.noise_scale.measure(
            micro_norms.mean_square(),
            sum(norm**2 for norm in norm_values.values()),
            small=tokens // micro_norms.count,
            big=tokens,
        )
    return record


def count_batch_targets(batch: np.ndarray, config: Config, processes: Processes) -> int | None:
    """Return the targets of a batch over all ranks, or None if every token is one: a collective.

    Rows of chats have different numbers of targets, and every target has the same weight.
    """
    if not config.data.has_chats:
        return None
    (total,) = processes.sum(count_targets(batch))
    return round(total)


def seed_step(seed: int, step: int, data_rank: int) -> None:
    """Seed the random numbers of a step (dropout), so that a resumed run draws the same ones.

    Ranks that read the same data draw the same numbers.
    """
    sequence = np.random.SeedSequence([seed, step, data_rank])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)


def to_device(batch: np.ndarray, device: torch.device) -> Tensor:
    """Return a batch on the device; the host does not wait for the copy to a GPU."""
    tensor = torch.from_numpy(batch)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _mark(device: torch.device) -> float | torch.cuda.Event:
    """Return a moment of the work of the device, for `_seconds_between`; CUDA is not waited for."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
