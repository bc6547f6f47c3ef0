"""Gradients of sharded parameters: missing, partial, non-finite."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from tests.distributed.layouts import gathered, make, mesh_of, placed, reference, rows, whole


def train(change: str) -> dict[str, Tensor]:
    row = next(row for row in rows(dist.get_world_size()) if row.name == "fsdp")
    mesh = mesh_of(row)
    place = placed(row, mesh)
    parameters, optimizer = make(place)
    for seed in (1, 2):
        for name, parameter in parameters.items():
            parameter.grad = gradient(change, name, whole(name, seed), place, mesh)
        optimizer.step()
    return gathered(parameters)


def gradient(change: str, name: str, tensor: Tensor, place: Any, mesh: Any) -> Tensor | None:
    if name not in ("tall", "experts", "norm"):
        return place(name, tensor)
    if change == "missing":
        return None
    if change == "missing here":
        here = place(name, tensor)
        if dist.get_rank() == 1:
            return None
        return here
    if change == "partial":
        share = tensor / mesh.size()
        return DTensor.from_local(share, mesh, [Partial()], run_check=False)
    if change == "replicated":
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return (
        DTensor.from_local(
            tensor.tensor_split(mesh.size(), 1)[dist.get_rank()].contiguous(),
            mesh,
            [Shard(1)],
            run_check=False,
        )
        if tensor.ndim == 2 and tensor.shape[1] % mesh.size() == 0
        else place(name, tensor)
    )


def test_gradients_are_brought_to_where_the_parameter_is(world) -> None:
    expected = reference(2)
    for change in ("partial", "replicated", "columns"):
        for result in world(2).run(train, change):
            for name, tensor in expected.items():
                torch.testing.assert_close(result[name], tensor, rtol=1e-4, atol=2e-5)


def test_what_has_no_gradient_anywhere_stays_as_it_is(world) -> None:
    for result in world(2).run(train, "missing"):
        for name in ("tall", "experts", "norm"):
            assert torch.equal(result[name], whole(name, 0))
        assert not torch.equal(result["plain"], whole("plain", 0))


def test_what_has_a_gradient_on_some_ranks_counts_as_zeros_on_the_others(world) -> None:
    parameters, optimizer = make(lambda _, tensor: tensor)
    for seed in (1, 2):
        for name, parameter in parameters.items():
            full = whole(name, seed)
            if name in ("tall", "experts", "norm"):
                full.chunk(2)[1].zero_()
            parameter.grad = full
        optimizer.step()
    for result in world(2).run(train, "missing here"):
        for name, parameter in parameters.items():
            torch.testing.assert_close(result[name], parameter.detach(), rtol=1e-4, atol=2e-5)
