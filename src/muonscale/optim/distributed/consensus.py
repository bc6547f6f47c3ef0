"""What all ranks have to know before a step: who has a gradient, and whether all are finite.

One small message per set of ranks. A parameter whose gradient is missing on every rank is left out;
missing on some, it counts as zeros where the parameter is sharded and is an error where it is
replicated, since the ranks would drift apart.
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
    """The gradients of one parameter, on this rank or on all."""

    here: bool
    """There is one."""
    moved: bool = False
    """It lies otherwise than its parameter, so that all ranks have to bring it there together."""


def agree_on_presence(
    names: Sequence[str],
    present: Sequence[Presence],
    replicated: Sequence[bool],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[bool]:
    """Return which parameters take part in the step, the same on all ranks.

    Args:
        names: of the parameters, the same on all ranks.
        present: their gradients on this rank.
        replicated: whether all ranks hold the same of them.
        group: the ranks.
        device: of the gradients. The answer is needed on the host: where the group cannot reduce
            there, this waits for the device.

    Raises:
        LayoutError: for a gradient that is missing on some ranks and cannot be taken as zeros.
    """
    rows = [[p.here for p in present], [not p.here for p in present], [p.moved for p in present]]
    message = torch.tensor(rows, dtype=torch.int32, device=_host_or(device, group))
    dist.all_reduce(message, dist.ReduceOp.MAX, group=group)
    anywhere, missing, moved = message.tolist()
    for name, some, not_all, shift, alike in zip(
        names, anywhere, missing, moved, replicated, strict=True
    ):
        if some and not_all and alike:
            raise LayoutError(
                f"{name} has a gradient on some ranks and none on others, though all hold the whole of "
                "it: the ranks would drift apart. Reduce the gradients first, with "
                "find_unused_parameters=True for DistributedDataParallel"
            )
        if some and not_all and shift:
            raise LayoutError(
                f"{name} has a gradient on some ranks and none on others, and where there is one it "
                "lies otherwise than the parameter: give it zeros where it is missing"
            )
    return [bool(some) for some in anywhere]


def _host_or(device: torch.device, group: dist.ProcessGroup) -> torch.device:
    return torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device


def agree_on_finite(
    check: FiniteCheck, names: Sequence[str], groups: Sequence[dist.ProcessGroup]
) -> FiniteCheck:
    """Return a check whose answer is that of all ranks of all groups.

    Args:
        check: of this rank; may lack some of `names`.
        names: of all parameters that several ranks share, alike on all of them.
        groups: from small to large; the last contains the others.
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
    """Raise LayoutError where not all ranks of a group have the same digest."""
    digests: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest, group=group)
    if len(set(digests)) != 1:
        other = next(rank for rank, d in enumerate(digests) if d != digests[0])
        raise LayoutError(
            f"ranks 0 and {other} of the group disagree about the parameters, their layouts or the "
            "optimizer's options: they have to be built alike on all ranks"
        )


def total(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of a tensor over a group; None is this process alone."""
    if group is None:
        return value
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value
