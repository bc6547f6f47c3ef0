"""Pieces of local tensors against slices of whole matrices, for what torch really puts on a rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from muonscale.errors import LayoutError
from muonscale.optim.distributed.dtensor import sharding_of, to_local
from muonscale.optim.matrices.sharding import pieces, read_piece, shard_coordinates, write_piece_
from muonscale.optim.matrices.spec import MatrixSpec, unview, view
from tests.distributed.layouts import SHAPES, mesh_of, placed, rows, whole


def check(name: str, full: torch.Tensor, there: Any, matrices: MatrixSpec) -> int:
    """Compare every piece of this rank, read and written; return how many elements there are."""
    sharding = sharding_of(name, there, matrices)
    assert sharding is not None
    mesh_rank = sharding.ranks.index(torch.distributed.get_rank())
    batches = view(full, matrices)
    alone = [matrix for batch in batches for matrix in batch]
    copy = torch.zeros_like(to_local(there))
    elements = 0
    for piece in pieces(sharding, shard_coordinates(sharding, mesh_rank)):
        expected = alone[piece.matrix][slice(*piece.rows), slice(*piece.columns)]
        assert torch.equal(read_piece(to_local(there), matrices, piece), expected), (name, piece)
        write_piece_(copy, matrices, piece, expected)
        elements += piece.elements
    assert torch.equal(copy, to_local(there)), name
    assert elements == to_local(there).numel()
    assert torch.equal(unview(batches, matrices, full.shape), full)
    return elements


def all_rows(size: int) -> int:
    elements = 0
    for row in rows(size):
        place = placed(row, mesh_of(row))
        for name, (_, matrices) in SHAPES.items():
            full = whole(name, 0)
            elements += check(name, full, place(name, full), matrices)
    return elements


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_pieces_are_the_slices_of_the_matrices(world, size: int) -> None:
    assert all(elements > 0 for elements in world(size).run(all_rows, size))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)


def fsdp_over_tensor(hidden: int) -> int:
    torch.manual_seed(0)
    block = Block(12, hidden)
    full = {name: p.detach().clone() for name, p in block.named_parameters()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(block, mesh=mesh["dp"])
    return sum(check(n, full[n], p, MatrixSpec()) for n, p in block.named_parameters())


@pytest.mark.parametrize("hidden", [16, 18, 22, 6])
def test_what_fully_shard_makes_of_tensor_parallel_layers_is_understood(world, hidden: int) -> None:
    elements = world(4).run(fsdp_over_tensor, hidden)
    assert sum(elements) == 2 * 12 * hidden


def partial(_: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(LayoutError) as error:
        sharding_of("w", DTensor.from_local(torch.ones(2, 2), mesh, [Partial()]), MatrixSpec())
    return str(error.value)


def test_a_placement_that_is_not_understood_is_named(world) -> None:
    for text in world(2).run(partial, 0):
        assert "w (2, 2)" in text
        assert "Partial" in text
        assert "mesh" in text.lower()
