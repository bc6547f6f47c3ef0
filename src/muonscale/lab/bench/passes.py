"""Forward and backward passes of a model at its micro-batch, to compare with a step."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from muonscale.lab.bench.measure import seconds_of
from muonscale.lab.config.load import Config
from muonscale.lab.estimate.activations import activation_bytes
from muonscale.lab.estimate.memory import rank_memory
from muonscale.lab.estimate.resolve import ResolvedPlan
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.setup import build_parallelized
from muonscale.lab.training.step import next_token_loss

UNTIMED = 2
"""Micro-batches that are run before timing."""


def passes_need(planned: ResolvedPlan) -> int:
    """Return the bytes of weights, gradients and a micro-batch's passes; no optimizer state."""
    activations = activation_bytes(planned.shape, planned.placement.topology, planned.workload)
    memory = rank_memory(planned.placement, planned.workload, activations, planned.device.kind)
    return memory.parameters + memory.gradients + memory.passes


def time_passes(
    config: Config, shape: PreTrainedConfig, micro_tokens: int, rounds: int, device: torch.device
) -> list[float]:
    """Return the seconds of `rounds` micro-batches of random tokens, forward and backward."""
    forward = build_parallelized(config, shape, Processes(device=device), None)
    forward.model.train()
    length = config.data.sequence_length
    size = (micro_tokens // length, length + 1)
    tokens = torch.randint(shape.vocab_size, size, generator=torch.Generator().manual_seed(0))
    rows = tokens.to(device)

    def once() -> None:
        next_token_loss(forward, rows).backward()

    for _ in range(UNTIMED):
        once()
    return [seconds_of(once, device) for _ in range(rounds)]
