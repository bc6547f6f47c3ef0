"""Norms and clipping of raw gradients, before the optimizer sees them."""

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

    A collective of all ranks, if there are several; of a sharded parameter each has a part.
    """
    groups = optimizer.param_groups
    if processes is None or not processes.many:
        return {group["name"]: _norm(group) for group in groups}
    world = processes.topology.world
    squares = [sum_of_squares(group["params"], world, processes.device) for group in groups]
    sums = torch.stack(squares)
    dist.all_reduce(sums)
    return dict(zip([group["name"] for group in groups], sums.sqrt().float(), strict=True))


def sum_of_squares(params: list[Tensor], world: int, device: torch.device) -> Tensor:
    """Return this rank's part of the sum of squares of gradients, float64, 0-D.

    What several ranks hold alike is divided by their number, so that the sum over all is right.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in params:
        if parameter.grad is not None:
            square = torch.linalg.vector_norm(to_local(parameter.grad)).double().square()
            total += square * _parts(parameter) / world
    return total


def _parts(parameter: Any) -> int:
    """Return into how many parts a parameter is cut."""
    if not is_sharded(parameter):
        return 1
    mesh = parameter.device_mesh
    return math.prod(
        mesh.size(axis) for axis, p in enumerate(parameter.placements) if not p.is_replicate()
    )


def clip_gradients(
    optimizer: Optimizer,
    norms: dict[str, Tensor],
    *,
    max_norm: float,
    clip: Literal["adamw", "all"],
) -> None:
    """Scale the gradients of the clipped groups so that their joint norm is at most `max_norm`.

    Under `clip="adamw"` the groups of a scale-free rule such as Muon keep their gradients: the length
    of their step does not depend on them.

    Args:
        optimizer: its groups have `name` and `rule`.
        norms: what `gradient_norms` returned.
        max_norm: largest joint norm.
        clip: groups of the AdamW rule only, or all groups together.
    """
    groups = [g for g in optimizer.param_groups if clip == "all" or not rule_of(g).scale_free]
    grads = [grad for group in groups for grad in _held(group)]
    if not grads:
        return
    joint = torch.linalg.vector_norm(torch.stack([norms[g["name"]] for g in groups]))
    torch._foreach_mul_(grads, (max_norm / (joint + 1e-12)).clamp(max=1.0))


def _held(group: dict[str, Any]) -> list[Tensor]:
    """Return what of a group's gradients is on this rank."""
    return [to_local(p.grad) for p in group["params"] if p.grad is not None]


def _norm(group: dict[str, Any]) -> Tensor:
    if not (grads := _held(group)):
        return torch.zeros((), device=group["params"][0].device)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
