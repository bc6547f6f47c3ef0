"""What one run costs on one process: operations counted, seconds measured."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.models.build import build_model, meta_model
from muonscale.lab.models.flops import flops_per_token, optimizer_flops
from muonscale.lab.models.structure import count_parameters
from muonscale.lab.training.dry_run import planned_shape
from muonscale.lab.training.setup import build_optimizer

LARGEST_PROBE = 2e12
"""Operations of a step up to which it is timed: about half a minute on two cores."""


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What a run costs, whatever it runs on."""

    parameters: int
    without_embeddings: int
    flops_per_token: int
    """Forward and backward, as `muonscale.lab.models.build.flops_per_token` counts them."""
    newton_schulz_flops: int
    """Of the optimizer in one step."""
    steps: int
    tokens: int

    @property
    def flops(self) -> int:
        """Of the run, Newton-Schulz included."""
        return self.tokens * self.flops_per_token + self.steps * self.newton_schulz_flops


def run_cost(config: Config) -> RunCost:
    """Return what a run costs; nothing is allocated.

    Raises:
        ConfigError: for a mixture that does not say how many experts a token goes to.
    """
    shape = planned_shape(config)
    model = meta_model(shape)
    per_token = flops_per_token(shape, model, config.data.sequence_length)
    if per_token is None:
        raise ConfigError(
            f"model_type {shape.model_type!r}: it cannot be told how many experts a token meets, so "
            "its operations cannot be counted"
            "; accepted are stacked experts and num_experts_per_tok"
        )
    size = count_parameters(model)
    return RunCost(
        parameters=size.total,
        without_embeddings=size.without_embeddings,
        flops_per_token=per_token,
        newton_schulz_flops=optimizer_flops(build_optimizer(model, config.optimizer).param_groups),
        steps=config.steps,
        tokens=config.timeline.tokens_before(config.steps),
    )


def measure_step(config: Config, cost: RunCost, *, threads: int, steps: int = 2) -> float | None:
    """Return the median seconds of a training step of random tokens on this machine's CPU.

    Two steps more than are timed are taken: the first ones allocate. Evaluation and checkpoints are
    not in it.

    Returns:
        The seconds, None for a model of which a step is too long to be tried (`LARGEST_PROBE`).
    """
    batch = config.timeline.largest_batch
    tokens = batch * config.data.sequence_length
    if tokens * cost.flops_per_token + cost.newton_schulz_flops > LARGEST_PROBE:
        return None
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _measured(config, batch, steps)
    finally:
        torch.set_num_threads(former)


def _measured(config: Config, batch: int, steps: int) -> float:
    shape = planned_shape(config)
    model = build_model(shape, seed=0)
    optimizer = build_optimizer(model, config.optimizer)
    rows = torch.randint(shape.vocab_size, (batch, config.data.sequence_length + 1))
    parts = rows.split(config.micro_batch_sequences or batch)
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        optimizer.zero_grad()
        for part in parts:
            logits = model(part[:, :-1]).logits
            F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten()).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])
