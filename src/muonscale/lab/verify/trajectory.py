"""A few training steps, and what of them can be compared between arrangements of processes."""

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
class Whole:
    """Tensors of all parameters, by name, on the CPU of the first rank; none on the others."""

    values: dict[str, Tensor] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)
    """Largest difference between what two ranks have for the same parameter; 0 in one process."""


@dataclass(frozen=True)
class Trajectory:
    """What a few training steps gave."""

    losses: list[float]
    """Nats per token, before each step."""
    gradients: Whole
    """Raw, of the first step: before clipping."""
    weights: Whole
    """After the last step."""
    moved: dict[str, float]
    """Largest change of an element of each parameter from the first step to the last."""
    groups: dict[str, str]
    """The optimizer's group of every parameter."""

    def save(self, path: Path) -> None:
        """Write to a file."""
        parts = {"gradients": vars(self.gradients), "weights": vars(self.weights)}
        torch.save(vars(self) | parts, path)

    @classmethod
    def load(cls, path: Path) -> Trajectory:
        """Read what `save` wrote."""
        plain = torch.load(path, weights_only=True)
        return cls(**plain | {key: Whole(**plain[key]) for key in ("gradients", "weights")})


def take_steps(
    run: Run, steps: int, batch_at: Callable[[int], np.ndarray] | None = None
) -> Trajectory:
    """Train a fresh run for a few steps: a collective of all ranks.

    Nothing is written. The raw gradients of the first step are taken by a pass of their own, since
    a step clips them.

    Args:
        run: as set up, at step 0; changed.
        steps: optimizer steps.
        batch_at: this rank's share of the batch of a step; the run's own when not given.
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
    gradients = whole({name: _gradient(p) for name, p in parameters.items()}, processes)
    before = {name: to_local(p).detach().clone() for name, p in parameters.items()}
    losses = [
        train_step(state, batch_at(step), run.config, processes)["loss"] for step in range(steps)
    ]
    state.optimizer.check_finite()  # of the last step: no other step asks
    moves = [largest(to_local(p).detach() - before[name]) for name, p in parameters.items()]
    return Trajectory(
        losses,
        gradients,
        whole({name: p.detach() for name, p in parameters.items()}, processes),
        dict(zip(parameters, largest_of_ranks(moves, processes), strict=True)),
        {
            name: group["name"]
            for group in state.optimizer.param_groups
            for name in group["param_names"]
        },
    )


def _gradient(parameter: Tensor) -> Tensor:
    """Return a gradient; none at all, as of an expert without tokens, is a zero."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@torch.no_grad()
def whole(tensors: dict[str, Tensor], processes: Processes) -> Whole:
    """Gather tensors on the first rank, and see how far apart the ranks' are: a collective."""
    values, apart = {}, []
    for name, tensor in tensors.items():
        here = gather_full(tensor).detach().clone()
        if processes.many:
            mine = here.clone()
            dist.broadcast(here, 0)
            apart.append(largest(mine - here))
        if processes.is_first:
            values[name] = here.to("cpu", torch.float32)
    if not processes.many:
        return Whole(values, dict.fromkeys(values, 0.0))
    return Whole(values, dict(zip(tensors, largest_of_ranks(apart, processes), strict=True)))


def largest(tensor: Tensor) -> float:
    """Return the largest magnitude of any element, infinity where one is not a number."""
    value = float(tensor.abs().max()) if tensor.numel() else 0.0
    return value if math.isfinite(value) else math.inf


def largest_of_ranks(values: list[float], processes: Processes) -> list[float]:
    """Return the largest of all ranks' values, one by one: a collective."""
    if not processes.many:
        return values
    found = torch.tensor(values, device=processes.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()
