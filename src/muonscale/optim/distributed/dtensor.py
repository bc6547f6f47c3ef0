"""What torch says of where a parameter lies, as a `Sharding`; local tensors; process groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.errors import LayoutError
from muonscale.optim.matrices.sharding import Cut, Sharding, cut_coordinates, local_shape
from muonscale.optim.matrices.spec import MatrixSpec


def is_sharded(tensor: Any) -> bool:
    """Return whether `tensor` is a DTensor, without importing what makes one."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return what of `tensor` is on this rank, without a copy."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensor: Any) -> Tensor:
    """Return the whole of a tensor; a collective of its mesh if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def placed_like(tensor: Any, target: Any) -> Tensor:
    """Return a whole or sharded tensor with the placements of a sharded one, on its mesh."""
    from torch.distributed.tensor import distribute_tensor

    if is_sharded(tensor):
        return tensor.redistribute(placements=target.placements)
    there = tensor.to(target.device)
    return distribute_tensor(there, target.device_mesh, target.placements, src_data_rank=None)


def sharding_of(
    name: str, parameter: Any, matrices: MatrixSpec, ranks: Sequence[int] | None = None
) -> Sharding | None:
    """Return how a parameter lies on more than one rank, or None.

    Args:
        name: for messages.
        parameter: DTensor on any mesh, or a plain tensor.
        matrices: stored in it.
        ranks: of the group that holds plain tensors alike.

    Raises:
        LayoutError: for placements that are not understood, or a local tensor that is not what
            they say.
    """
    shape = tuple(parameter.shape)
    if not is_sharded(parameter):
        if ranks is None or len(ranks) == 1:
            return None
        mesh = (len(ranks),)
        return Sharding(shape, matrices, mesh, (None,), tuple(ranks), owned=True)
    mesh = parameter.device_mesh
    cuts = tuple(_cut(name, parameter, placement) for placement in parameter.placements)
    layout = Sharding(shape, matrices, tuple(mesh.shape), cuts, tuple(mesh.mesh.flatten().tolist()))
    if dist.get_rank() in layout.ranks:
        seat = layout.ranks.index(dist.get_rank())
        if tuple(local(parameter).shape) != local_shape(layout, seat):
            raise LayoutError(
                f"{_described(name, parameter)} has {tuple(local(parameter).shape)} on rank "
                f"{dist.get_rank()}, where its placements give {local_shape(layout, seat)}"
            )
    return layout


def part_here(layout: Sharding | None) -> tuple[Sharding, tuple[int, ...]] | None:
    """Return a layout with this process's `cut_coordinates`; None where all of the tensor is here."""
    if layout is None or layout.replicated:
        return None
    return layout, cut_coordinates(layout, layout.ranks.index(dist.get_rank()))


def _cut(name: str, parameter: Any, placement: Any) -> Cut | None:
    if placement.is_replicate():
        return None
    dim = getattr(placement, "dim", None)
    if dim is None or placement.is_partial():
        raise LayoutError(
            f"{_described(name, parameter)}: {placement} of a parameter is not understood; Shard, "
            "the strided Shard of FSDP over tensor parallelism, and Replicate are"
            " accepted"
        )
    return Cut(dim % parameter.ndim, getattr(placement, "split_factor", 1))


def _described(name: str, parameter: Any) -> str:
    return (
        f"{name} {tuple(parameter.shape)} with placements {tuple(parameter.placements)} on "
        f"{parameter.device_mesh}"
    )


def local_gradient(name: str, parameter: Any, gradient: Any) -> Tensor:
    """Return the part of a gradient that belongs to the local part of its parameter.

    A collective on the parameter's mesh where the gradient lies otherwise than the parameter, such
    as one that is still to be summed.
    """
    if not is_sharded(parameter):
        return gradient
    if not is_sharded(gradient):
        raise LayoutError(
            f"{_described(name, parameter)} has a gradient that is a plain tensor: it cannot be told "
            "which part it is of"
            "; give it the placements of the parameter, as DTensor.from_local does"
        )
    if differs(parameter, gradient):
        gradient = gradient.redistribute(placements=parameter.placements)
    return gradient.to_local()


def differs(parameter: Any, gradient: Any) -> bool:
    """Return whether a gradient lies otherwise than its parameter."""
    return is_sharded(gradient) and tuple(gradient.placements) != tuple(parameter.placements)


def zeros_like_cut(parameter: Any, layout: Sharding, dtype: torch.dtype) -> Tensor:
    """Return zeros on the mesh of a DTensor that lie as `layout`, which cuts fewer axes, says."""
    from torch.distributed.tensor import DTensor, Replicate

    placements = [
        Replicate() if cut is None else placement
        for cut, placement in zip(layout.cuts, parameter.placements, strict=True)
    ]
    here = torch.zeros(
        local_shape(layout, layout.ranks.index(dist.get_rank())),
        dtype=dtype,
        device=local(parameter).device,
    )
    whole = torch.empty(layout.shape, device="meta")
    return DTensor.from_local(
        here,
        parameter.device_mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """Return a process group of exactly these global ranks, rising; None for a single one.

    All of them have to call it.
    """
    if len(ranks) == 1:
        return None
    if list(ranks) == list(range(dist.get_world_size())):
        return dist.group.WORLD
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # this process is one of them
    return group
