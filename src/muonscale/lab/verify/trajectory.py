"""A few training steps, and the numbers of them that layouts of processes are compared by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.micro_batches import micro_batch_size
from muonscale.lab.training.setup import Run
from muonscale.lab.training.step import accumulate, count_batch_targets, train_step
from muonscale.optim.distributed.dtensor import gather_full, to_local


@dataclass(frozen=True)
class GatheredTensors:
    """Full tensors of all parameters by name, on the CPU of the first rank; empty on the others."""

    values: dict[str, Tensor] = field(default_factory=dict)
    rank_differences: dict[str, float] = field(default_factory=dict)
    """Largest difference between two ranks' copies of a parameter; 0 in one process."""


@dataclass(frozen=True)
class Trajectory:
    """The result of a few training steps."""

    losses: list[float]
    """Loss before each step, in nats per token."""
    gradients: GatheredTensors
    """Gradients of the first step before clipping."""
    weights: GatheredTensors
    """Weights after the last step."""
    moved: dict[str, float]
    """Largest change of an element of each parameter from the first step to the last."""
    groups: dict[str, str]
    """The optimizer's group of every parameter."""

    def save(self, path: Path) -> None:
        """Save to a file."""
        parts = {"gradients": vars(self.gradients), "weights": vars(self.weights)}
        torch.save(vars(self) | parts, path)

    @classmethod
    def load(cls, path: Path) -> Trajectory:
        """Load from a file that `save` wrote."""
        plain = torch.load(path, weights_only=True)
        return cls(
            **plain | {key: GatheredTensors(**plain[key]) for key in ("gradients", "weights")}
        )


def take_steps(
    run: Run, steps: int, batch_at: Callable[[int], np.ndarray] | None = None
) -> Trajectory:
    """Train a fresh run for a few steps: a collective of all ranks.

    Nothing is written. A separate pass computes the gradients of the first step, since a step clips
    them.

    Args:
        run: a run at step 0, which is trained.
        steps: the number of optimizer steps.
        batch_at: returns this rank's share of the batch of a step; the default is the run's own.
    """
    state, processes = run.state, run.processes
    batch_at = batch_at or run.batches.at
    state.model.train()
    parameters = dict(state.model.named_parameters())
    rows = batch_at(0)
    first = torch.from_numpy(rows).to(processes.device)
    micro_batch = micro_batch_size(run.config, len(first))
    targets = count_batch_targets(rows, run.config, processes)
    share = None if targets is None else targets / processes.topology.data_ranks
    accumulate(state.forward, state.routing, first, micro_batch, targets=share)
    # A parameter without a gradient, such as an expert without tokens, has a gradient of 0.
    gradients = gather_tensors(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()},
        processes,
    )
    before = {name: to_local(p).detach().clone() for name, p in parameters.items()}
    losses = [
        train_step(state, batch_at(step), run.config, processes)["loss"] for step in range(steps)
    ]
    state.optimizer.check_finite()  # of the last step, which no later step checks
    moves = [
        largest_magnitude(to_local(p).detach() - before[name]) for name, p in parameters.items()
    ]
    return Trajectory(
        losses,
        gradients,
        gather_tensors({name: p.detach() for name, p in parameters.items()}, processes),
        dict(zip(parameters, max_over_ranks(moves, processes), strict=True)),
        {
            name: group["name"]
            for group in state.optimizer.param_groups
            for name in group["param_names"]
        },
    )


@torch.no_grad()
def gather_tensors(tensors: dict[str, Tensor], processes: Processes) -> GatheredTensors:
    """Gather tensors on the first rank and compare the ranks' copies: a collective."""
    values, differences = {}, []
    for name, tensor in tensors.items():
        here = gather_full(tensor).detach().clone()
        if processes.many:
            mine = here.clone()
            dist.broadcast(here, 0)
            differences.append(largest_magnitude(mine - here))
        if processes.is_first:
            values[name] = here.to("cpu", torch.float32)
    if not processes.many:
        return GatheredTensors(values, dict.fromkeys(values, 0.0))
    largest = max_over_ranks(differences, processes)
    return GatheredTensors(values, dict(zip(tensors, largest, strict=True)))


def largest_magnitude(tensor: Tensor) -> float:
    """Return the largest magnitude of any element; infinity if one is not finite."""
    value = float(tensor.abs().max()) if tensor.numel() else 0.0
    return value if math.isfinite(value) else math.inf


def max_over_ranks(values: list[float], processes: Processes) -> list[float]:
    """Return the elementwise maximum of all ranks' values: a collective."""
    if not processes.many:
        return values
    largest = torch.tensor(values, device=processes.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()
