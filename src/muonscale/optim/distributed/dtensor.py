"""DTensor as the optimizer sees it: `Sharding`s, local tensors, redistribution, process groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.errors import GroupingError, LayoutError
from muonscale.optim.matrices.sharding import Cut, Sharding, local_shape, shard_coordinates
from muonscale.optim.matrices.spec import MatrixSpec


def is_sharded(tensor: Any) -> bool:
    """Return whether `tensor` is a DTensor, without importing DTensor."""
    return hasattr(tensor, "device_mesh")


def to_local(tensor: Tensor) -> Tensor:
    """Return the local part of `tensor`, without a copy."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gather_full(tensor: Any) -> Tensor:
    """Return the full tensor. A collective of its mesh if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def redistribute_like(tensor: Any, target: Any) -> Tensor:
    """Return a full or sharded tensor with the mesh and placements of the DTensor `target`."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    if is_sharded(tensor):
        return tensor.redistribute(placements=target.placements)
    everywhere = [Replicate()] * target.device_mesh.ndim
    # distribute_tensor itself divides in another order than FSDP over tensor parallelism
    return distribute_tensor(
        tensor.to(target.device), target.device_mesh, everywhere, src_data_rank=None
    ).redistribute(placements=target.placements)


def sharding_of(
    name: str, parameter: Any, matrices: MatrixSpec, ranks: Sequence[int] | None = None
) -> Sharding | None:
    """Return the sharding of a parameter over several ranks, or None if it is on one rank only.

    Args:
        name: name of the parameter, for errors.
        parameter: DTensor on any mesh, or a plain tensor.
        matrices: how its logical matrices are stored.
        ranks: global ranks that hold identical replicas of plain tensors; None if there are none.

    Raises:
        LayoutError: if a placement is not supported, or this rank is not in the mesh.
    """
    shape = tuple(parameter.shape)
    if not is_sharded(parameter):
        if ranks is None or len(ranks) == 1:
            return None
        mesh = (len(ranks),)
        return Sharding(shape, matrices, mesh, (None,), tuple(ranks), partitioned=True)
    mesh = parameter.device_mesh
    cuts = tuple(_cut(name, parameter, placement) for placement in parameter.placements)
    in_mesh: list[int] = mesh.mesh.flatten().tolist()
    if dist.get_rank() not in in_mesh:
        raise LayoutError(
            f"{_describe(name, parameter)} is on the ranks {in_mesh}, and this is rank "
            f"{dist.get_rank()}. Leave it out of the optimizer on ranks that are not in its mesh"
        )
    return Sharding(shape, matrices, tuple(mesh.shape), cuts, tuple(in_mesh))


def check_local_shape(name: str, parameter: Any, sharding: Sharding) -> None:
    """Raise LayoutError if this rank holds another shape than the placements of a DTensor give."""
    given = local_shape(sharding, sharding.ranks.index(dist.get_rank()))
    held = tuple(to_local(parameter).shape)
    if held != given:
        raise LayoutError(
            f"{_describe(name, parameter)} has the local shape {held} on rank {dist.get_rank()}, "
            f"but its placements give {given}. Shard it with parallelize_module and fully_shard, and "
            "give it at least as many rows and columns as the mesh has ranks along them"
        )


def part_here(sharding: Sharding | None) -> tuple[Sharding, tuple[int, ...]] | None:
    """Return the sharding and this rank's `shard_coordinates`; None if the tensor is whole here."""
    if sharding is None or sharding.replicated:
        return None
    return sharding, shard_coordinates(sharding, sharding.ranks.index(dist.get_rank()))


def _cut(name: str, parameter: Any, placement: Any) -> Cut | None:
    if placement.is_replicate():
        return None
    dim = getattr(placement, "dim", None)
    if dim is None or placement.is_partial():
        raise LayoutError(
            f"{_describe(name, parameter)}: the placement {placement} is not supported for a "
            "parameter; accepted: Shard, Replicate, and the strided Shard of FSDP over tensor "
            "parallelism"
        )
    return Cut(dim % parameter.ndim, getattr(placement, "split_factor", 1))


def _describe(name: str, parameter: Any) -> str:
    return f"{name} {describe(parameter)}"


def describe(parameter: Any) -> str:
    """Return shape, dtype and placements of a parameter: the same text on all of its ranks."""
    text = f"{tuple(parameter.shape)} {parameter.dtype}"
    if not is_sharded(parameter):
        return text
    mesh = parameter.device_mesh
    return f"{text} with placements {tuple(parameter.placements)} on a mesh {tuple(mesh.shape)}"


def check_gradient(name: str, parameter: Any, gradient: Any) -> None:
    """Raise LayoutError for a gradient of unknown placements, GroupingError for a sparse one."""
    if gradient.layout != torch.strided:
        raise GroupingError(
            f"{name} has a sparse gradient: only dense ones are accepted (an embedding gives them "
            "with sparse=False)"
        )
    if is_sharded(parameter) and not is_sharded(gradient):
        raise LayoutError(
            f"{_describe(name, parameter)} has a plain tensor as gradient, so its placements are "
            "unknown. Make it a DTensor with the placements of the parameter, for example with "
            "DTensor.from_local"
        )


def local_gradient(parameter: Any, gradient: Any) -> Tensor:
    """Return the gradient of the local part of a parameter.

    A collective of the parameter's mesh if the placements of the gradient differ from the
    parameter's, for example if the gradient is still a partial sum.
    """
    if not is_sharded(parameter):
        return gradient
    if placements_differ(parameter, gradient):
        gradient = gradient.redistribute(placements=parameter.placements)
    return gradient.to_local()


def placements_differ(parameter: Any, gradient: Any) -> bool:
    """Return whether the placements of a gradient differ from those of its parameter."""
    return is_sharded(gradient) and tuple(gradient.placements) != tuple(parameter.placements)


def zeros_with_sharding(parameter: Any, sharding: Sharding, dtype: torch.dtype) -> Tensor:
    """Return zeros with `sharding` on the mesh of a DTensor.

    `sharding` is the parameter's own, except that some mesh axes may replicate.
    """
    from torch.distributed.tensor import DTensor, Replicate

    placements = [
        Replicate() if cut is None else placement
        for cut, placement in zip(sharding.cuts, parameter.placements, strict=True)
    ]
    zeros = torch.zeros(
        local_shape(sharding, sharding.ranks.index(dist.get_rank())),
        dtype=dtype,
        device=to_local(parameter).device,
    )
    whole = torch.empty(sharding.shape, device="meta")
    return DTensor.from_local(
        zeros,
        parameter.device_mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    """Return the global ranks of a process group.

    Raises:
        LayoutError: if it does not exist, or this rank is not in it.
    """
    advice = "Make a new optimizer after init_process_group, with a group that has this rank"
    if not dist.is_initialized():
        raise LayoutError(
            f"torch.distributed is not initialized, so there is no process group {group}: it was "
            f"destroyed, or not made yet. {advice}"
        )
    try:
        ranks = tuple(dist.get_process_group_ranks(group))
    except (KeyError, TypeError, ValueError) as error:
        raise LayoutError(
            f"{group!r} is not a process group, or was destroyed by destroy_process_group. {advice}"
        ) from error
    if dist.get_rank() not in ranks:
        raise LayoutError(
            f"the process group has the ranks {ranks}, and this is rank {dist.get_rank()}. {advice}"
        )
    return ranks


def group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """Return a process group of these global ranks, which are sorted; None for a single rank.

    A collective of these ranks.
    """
    if len(ranks) == 1:
        return None
    if list(ranks) == list(range(dist.get_world_size())):
        return dist.group.WORLD
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # this process is one of them
    return group
