"""The cost of one run on one process: counted FLOPs and measured seconds."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from muonscale.lab.config.load import Config
from muonscale.lab.models.build import build_model, meta_model
from muonscale.lab.models.flops import unknown_experts
from muonscale.lab.models.loss import summed_loss
from muonscale.lab.models.structure import count_parameters
from muonscale.lab.training.dry_run import planned_shape
from muonscale.lab.training.micro_batches import micro_batch_size
from muonscale.lab.training.setup import build_optimizer, run_flops

LARGEST_PROBE = 2e12
"""Maximum FLOPs of a step that is timed: about half a minute on two cores."""


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """The cost of a run, independent of the device."""

    parameters: int
    without_embeddings: int
    flops_per_token: int
    """Forward and backward FLOPs; see `muonscale.lab.models.flops.flops_per_token`."""
    newton_schulz_flops: int
    """FLOPs of the optimizer in one step."""
    steps: int
    tokens: int

    @property
    def flops(self) -> int:
        """FLOPs of the run, including Newton-Schulz."""
        return self.tokens * self.flops_per_token + self.steps * self.newton_schulz_flops


def run_cost(config: Config) -> RunCost:
    """Return the cost of a run without allocating its model.

    Raises:
        ConfigError: for a mixture of experts whose configuration does not say how many experts a
            token uses.
    """
    shape = planned_shape(config)
    model = meta_model(shape)
    flops = run_flops(config, model)
    if flops is None:
        raise unknown_experts(shape)
    size = count_parameters(model)
    return RunCost(
        parameters=size.total,
        without_embeddings=size.without_embeddings,
        flops_per_token=flops["per_token"],
        newton_schulz_flops=flops["newton_schulz_per_step"],
        steps=config.steps,
        tokens=config.timeline.tokens_before(config.steps),
    )


def measure_step(config: Config, cost: RunCost, *, threads: int, steps: int = 2) -> float | None:
    """Return the median seconds of a training step of random tokens on this machine's CPU.

    Two warm-up steps are not timed. Evaluation and checkpoints are not included.

    Returns:
        The seconds, or None if a step would take too long (`LARGEST_PROBE`).
    """
    batch = config.timeline.largest_batch
    tokens = batch * config.data.sequence_length
    if tokens * cost.flops_per_token + cost.newton_schulz_flops > LARGEST_PROBE:
        return None
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shape = planned_shape(config)
        model = build_model(shape, seed=0)
        optimizer = build_optimizer(model, config.optimizer)
        rows = torch.randint(shape.vocab_size, (batch, config.data.sequence_length + 1))
        seconds = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            optimizer.zero_grad()
            for part in rows.split(micro_batch_size(config, batch)):
                logits = model(part[:, :-1]).logits
                summed_loss(logits, part[:, 1:]).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[2:])
    finally:
        torch.set_num_threads(former)
