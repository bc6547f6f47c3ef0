"""Agreement of ranks before a step: which parameters have gradients, and whether all are finite.

The ranks of each set exchange one small message. A parameter is left out if it has no gradient on
any rank. If it has one on only some ranks, the others use zeros if the parameter is sharded; for a
replicated parameter it is an error, because the replicas would diverge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.errors import LayoutError
from muonscale.optim.rules.nonfinite import FiniteCheck, answer


@dataclass(frozen=True)
class Presence:
    """The gradient of one parameter on this rank."""

    here: bool
    """Whether this rank has one."""
    moved: bool = False
    """Whether its placements differ from the parameter's. All ranks must then redistribute it."""


def agree_on_presence(
    names: Sequence[str],
    present: Sequence[Presence],
    replicated: Sequence[bool],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[bool]:
    """Return which parameters take part in the step, the same on all ranks.

    Args:
        names: names of the parameters, the same on all ranks.
        present: gradients of the parameters on this rank.
        replicated: whether each parameter is replicated on all ranks.
        group: process group of the ranks.
        device: device of the gradients. The host waits for it unless the group has a CPU backend.

    Raises:
        LayoutError: if a gradient is missing on some ranks and zeros cannot replace it.
    """
    rows = [[p.here for p in present], [not p.here for p in present], [p.moved for p in present]]
    on_host = "cpu:" in dist.get_backend_config(group)
    message = torch.tensor(rows, dtype=torch.int32, device="cpu" if on_host else device)
    dist.all_reduce(message, dist.ReduceOp.MAX, group=group)
    anywhere, missing, moved = message.tolist()
    for name, some, not_all, differs, replicas in zip(
        names, anywhere, missing, moved, replicated, strict=True
    ):
        if some and not_all and replicas:
            raise LayoutError(
                f"{name} is replicated, but has a gradient on some ranks and none on others, so the "
                "replicas would diverge. Reduce the gradients before the step; with "
                "DistributedDataParallel, set find_unused_parameters=True"
            )
        if some and not_all and differs:
            raise LayoutError(
                f"{name} has a gradient on some ranks and none on others, and the placements of the "
                "gradient differ from the parameter's. Set a gradient of zeros on the ranks that "
                "have none"
            )
    return [bool(some) for some in anywhere]


def agree_on_finite(
    check: FiniteCheck, names: Sequence[str], groups: Sequence[dist.ProcessGroup]
) -> FiniteCheck:
    """Return the combined check of all ranks of all groups.

    Args:
        check: check of this rank. It may lack some of `names`.
        names: names of all parameters that are on several ranks, the same on all ranks.
        groups: process groups from small to large. The last one contains the others.
    """
    places = {name: i for i, name in enumerate(names)}
    message = torch.zeros(len(names) + 1, dtype=torch.int32, device=check.on_device.device)
    for name, at_fault in zip(check.names, check.on_device, strict=True):
        place = message[places.get(name, len(names))]
        torch.maximum(place, at_fault, out=place)
    for group in groups:
        dist.all_reduce(message, dist.ReduceOp.MAX, group=group)
    return answer([*names, "a parameter of one process alone"], message)


def check_same(digest: str, group: dist.ProcessGroup) -> None:
    """Raise LayoutError if two ranks of a group have different digests."""
    digests: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest, group=group)
    if len(set(digests)) != 1:
        other = next(rank for rank, d in enumerate(digests) if d != digests[0])
        raise LayoutError(
            f"ranks 0 and {other} of the group have different parameters, shardings or optimizer "
            "options. Build the model and the optimizer identically on all ranks"
        )


def total(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of a tensor over a group, or the tensor itself if the group is None."""
    if group is None:
        return value
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value
