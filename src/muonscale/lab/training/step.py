"""One training step: forward, backward, clip, schedule, optimizer, and what there is to say of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from muonscale.lab.config import Config
from muonscale.lab.training.gradients import clip_gradients, gradient_norms
from muonscale.lab.training.schedule import apply_multiplier, multiplier
from muonscale.lab.training.state import TrainState


def next_token_loss(model: torch.nn.Module, batch_BL: Tensor) -> Tensor:
    """Return the mean cross entropy of the next tokens, in nats.

    Args:
        model: a Hugging Face causal language model.
        batch_BL: token ids, int64 [batch, length + 1]: inputs and, shifted by one, targets.
    """
    logits_BLV = model(input_ids=batch_BL[:, :-1]).logits
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), batch_BL[:, 1:].flatten())


def train_step(
    state: TrainState,
    batch: np.ndarray,
    config: Config,
    *,
    before_update: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Take one step and return its metrics record.

    Args:
        state: model, optimizer and position; changed by the step.
        batch: token ids, [batch, length + 1].
        config: clipping and schedule are read from it.
        before_update: called when the gradients are there and the weights are still the old ones.
    """
    start = time.perf_counter()
    optimizer, section = state.optimizer, config.optimizer
    device = next(state.model.parameters()).device
    loss = next_token_loss(state.model, torch.from_numpy(batch).to(device))
    optimizer.zero_grad()
    loss.backward()
    norms = gradient_norms(optimizer)
    if section.max_grad_norm is not None:
        clip_gradients(optimizer, norms, max_norm=section.max_grad_norm, clip=section.clip)
    apply_multiplier(optimizer, multiplier(config.schedule, state.step, config.steps))
    if before_update is not None:
        before_update()
    before = _now(device)
    optimizer.step()
    optimizer_seconds = _now(device) - before
    state.step += 1
    loss_value = loss.item()
    stats = optimizer.stats()
    seconds = time.perf_counter() - start
    return {
        "kind": "train",
        "step": state.step,
        "tokens": state.step * config.train.batch_tokens,
        "loss": loss_value,
        "lr": {group["name"]: group["lr"] for group in optimizer.param_groups},
        "grad_norm": {name: norm.item() for name, norm in norms.items()},
        "update_rms": float(stats["update_rms"]),
        "skipped_steps": stats["skipped_steps"],
        "tokens_per_second": config.train.batch_tokens / seconds,
        "step_ms": seconds * 1000,
        "optimizer_ms": optimizer_seconds * 1000,
    }


def _now(device: torch.device) -> float:
    """Return the time at which all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
