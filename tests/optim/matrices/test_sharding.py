"""What a rank holds, against torch: FSDP over tensor parallelism, and any placements of a DTensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from muonscale.optim.distributed.dtensor import sharding_of
from muonscale.optim.matrices.sharding import (
    Cut,
    Sharding,
    element_numbers,
    local_parts,
    local_shape,
    shard_coordinates,
    unravel,
)
from muonscale.optim.matrices.spec import PLAIN

ROWS = range(1, 98)
FSDP_ROWS = (1, 2, 3, 5, 7, 8, 13, 17, 24, 25, 31, 41, 61, 64, 81, 89, 97, 321, 325)
MESHES = [(d, t) for d in range(1, 9) for t in range(1, 9) if d * t <= 8]
"""Every mesh (shard, tensor) of up to 8 ranks."""


@contextmanager
def fake_mesh(shape: tuple[int, ...], names: tuple[str, ...], rank: int) -> Iterator[DeviceMesh]:
    """Yield a mesh as `rank` sees it; its collectives do nothing."""
    ranks = torch.Size(shape).numel()
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def _numbered(rows: int, tensor_axis: int) -> Tensor:
    """Return a tensor of distinct values with `rows` along the axis of tensor parallelism."""
    shape = (rows, 3) if tensor_axis == 0 else (13, rows)
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def _fsdp_over_tensor(mesh: DeviceMesh, axis: int, shard: str | tuple[str, str]) -> nn.Module:
    """Return a module with a parameter for each number of rows, sharded as in training."""
    module = nn.ParameterDict()
    for rows in FSDP_ROWS:
        whole = _numbered(rows, axis)
        placed = distribute_tensor(whole, mesh["tensor"], [Shard(axis)], src_data_rank=None)
        module[str(rows)] = nn.Parameter(placed)
    fully_shard(module, mesh=mesh[shard])
    return module


def _check_held(module: nn.Module, axis: int) -> None:
    for name, parameter in module.named_parameters():
        sharding = sharding_of(name, parameter, PLAIN)
        assert sharding is not None
        held = parameter.to_local().detach()
        coord = shard_coordinates(sharding, dist.get_rank())
        numbers = element_numbers(sharding, coord, torch.device("cpu"))
        expected = _numbered(int(name), axis).flatten()[numbers.long()]
        if held.numel():
            assert torch.equal(held, expected), name
        else:  # FSDP flattens what is empty
            assert not expected.numel(), name


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if 1 not in mesh], ids=str)
def test_every_rank_of_fsdp_over_tensor_parallelism_holds_what_its_sharding_says(
    mesh: tuple[int, int], axis: int
) -> None:
    for rank in range(mesh[0] * mesh[1]):
        with fake_mesh(mesh, ("shard", "tensor"), rank) as devices:
            _check_held(_fsdp_over_tensor(devices, axis, "shard"), axis)


@pytest.mark.parametrize("axis", [0, 1])
def test_replicas_of_fsdp_over_tensor_parallelism_hold_what_their_sharding_says(axis: int) -> None:
    for rank in range(8):
        with fake_mesh((2, 2, 2), ("replicate", "shard", "tensor"), rank) as devices:
            _check_held(_fsdp_over_tensor(devices, axis, ("replicate", "shard")), axis)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_fsdp_over_tensor_parallelism_holds_chunks_of_chunks(
    mesh: tuple[int, int], axis: int
) -> None:
    shards, tensor = mesh
    ranks = tuple(range(shards * tensor))
    for rows in ROWS:
        whole = _numbered(rows, axis)
        cuts = Cut(0, tensor if axis == 0 else 1), Cut(axis)
        sharding = Sharding(tuple(whole.shape), PLAIN, mesh, cuts, ranks)
        for rank in ranks:
            held = _chunk(_chunk(whole, tensor, axis, rank % tensor), shards, 0, rank // tensor)
            coord = shard_coordinates(sharding, rank)
            numbers = element_numbers(sharding, coord, torch.device("cpu"))
            assert torch.equal(whole.flatten()[numbers.long()], held)


def _chunk(whole: Tensor, ways: int, axis: int, place: int) -> Tensor:
    chunks = whole.chunk(ways, axis)
    empty = whole.narrow(axis, 0, 0)
    return chunks[place] if place < len(chunks) else empty


@pytest.mark.parametrize("mesh", [(8,), (2, 3), (3, 2), (4, 2), (2, 4), (2, 2, 2)], ids=str)
def test_shards_of_shards_are_those_of_torch(mesh: tuple[int, ...]) -> None:
    ranks = tuple(range(torch.Size(mesh).numel()))
    for axes in itertools.product([0, 1, None], repeat=len(mesh)):
        placements = [Replicate() if axis is None else Shard(axis) for axis in axes]
        cuts = tuple(None if axis is None else Cut(axis) for axis in axes)
        for rows in ROWS:
            sharding = Sharding((rows, 13), PLAIN, mesh, cuts, ranks)
            for rank in ranks:
                shape, offset = _compute_local_shape_and_global_offset(
                    (rows, 13), mesh, list(unravel(rank, mesh)), placements
                )
                assert local_shape(sharding, rank) == shape
                parts = local_parts(sharding, shard_coordinates(sharding, rank))
                if torch.Size(shape).numel():
                    assert tuple(axis[0].range[0] for axis in parts) == offset


def test_every_element_is_on_one_rank_in_the_order_of_the_cuts() -> None:
    for mesh, factors in [((4, 2), (2, 1)), ((2, 2, 2), (4, 2, 1)), ((2, 2, 2), (2, 2, 1))]:
        ranks = tuple(range(torch.Size(mesh).numel()))
        cuts = tuple(Cut(0, factor) for factor in factors)
        for rows in ROWS:
            sharding = Sharding((rows, 1), PLAIN, mesh, cuts, ranks)
            held = [r for rank in ranks for r in _rows(sharding, rank)]
            assert sorted(held) == list(range(rows))
            if factors != (2, 2, 1):  # from the last axis to the first, so ranks are in that order
                last_first = sorted(ranks, key=lambda rank: unravel(rank, mesh)[::-1])
                held = [r for rank in last_first for r in _rows(sharding, rank)]
                assert held == list(range(rows))


def _rows(sharding: Sharding, rank: int) -> list[int]:
    (rows, _) = local_parts(sharding, shard_coordinates(sharding, rank))
    return [row for part in rows for row in range(*part.range)]
