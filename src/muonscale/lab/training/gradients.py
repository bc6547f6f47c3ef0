"""Norms and clipping of raw gradients, before the optimizer step."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from muonscale.lab.parallel.processes import Processes
from muonscale.optim.distributed.dtensor import is_sharded, to_local
from muonscale.optim.rules.base import rule_of


def gradient_norms(optimizer: Optimizer, processes: Processes | None = None) -> dict[str, Tensor]:
    """Return the Frobenius norm of each group's gradients, by group name, 0-D tensors.

    A collective of all ranks, if there are several.
    """
    groups = optimizer.param_groups
    if processes is None or not processes.many:
        norms = {}
        for group in groups:
            grads, device = _local_gradients(group), group["params"][0].device
            norms[group["name"]] = (
                torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
                if grads
                else torch.zeros((), device=device)
            )
        return norms
    world = processes.topology.world
    squares = [sum_of_squares(group["params"], world, processes.device) for group in groups]
    sums = torch.stack(squares)
    dist.all_reduce(sums)
    return dict(zip([group["name"] for group in groups], sums.sqrt().float(), strict=True))


def sum_of_squares(params: list[Any], world: int, device: torch.device) -> Tensor:
    """Return this rank's part of the sum of squares of gradients, float64, 0-D.

    Replicated values are divided by the number of replicas, so that the sum over all ranks is
    right.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in params:
        if parameter.grad is None:
            continue
        shards = 1
        if is_sharded(parameter):
            placements = enumerate(parameter.placements)
            shards = math.prod(
                parameter.device_mesh.size(axis) for axis, p in placements if not p.is_replicate()
            )
        square = torch.linalg.vector_norm(to_local(parameter.grad)).double().square()
        total += square * shards / world
    return total


def clip_gradients(
    optimizer: Optimizer,
    norms: dict[str, Tensor],
    *,
    max_norm: float,
    clip: Literal["adamw", "all"],
) -> None:
    """Scale the gradients of the clipped groups so that their joint norm is at most `max_norm`.

    With `clip="adamw"` the gradients of scale-free rules such as Muon are not clipped: the size of
    their update does not depend on them.

    Args:
        optimizer: its groups have `name` and `rule`.
        norms: result of `gradient_norms`.
        max_norm: largest joint norm.
        clip: groups of the AdamW rule only, or all groups together.
    """
    groups = [g for g in optimizer.param_groups if clip == "all" or not rule_of(g).scale_free]
    grads = [grad for group in groups for grad in _local_gradients(group)]
    if not grads:
        return
    joint = torch.linalg.vector_norm(torch.stack([norms[g["name"]] for g in groups]))
    torch._foreach_mul_(grads, (max_norm / (joint + 1e-12)).clamp(max=1.0))


def _local_gradients(group: dict[str, Any]) -> list[Tensor]:
    return [to_local(p.grad) for p in group["params"] if p.grad is not None]
