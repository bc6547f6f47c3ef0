"""Kernels in channels_last format on many ranks take the steps of contiguous ones on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from muonscale.optim.muon import Muon
from muonscale.optim.parameters.convolutions import kernel_matrices

KERNELS: dict[str, nn.Module] = {
    "conv": nn.Conv2d(6, 8, 3),
    "grouped": nn.Conv2d(6, 8, 3, groups=2),
    "back": nn.ConvTranspose2d(8, 6, 3, groups=2),
}
FORMAT = torch.channels_last


def seeded(name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(KERNELS[name].weight.shape, generator=generator)


def trained(place: Any, **options: Any) -> dict[str, Tensor]:
    weights = {name: nn.Parameter(place(seeded(name, 0))) for name in KERNELS}
    matrices = {name: kernel_matrices(weights[name], conv) for name, conv in KERNELS.items()}
    group = {"params": list(weights.values()), "param_names": list(weights), "matrices": matrices}
    optimizer = Muon([group], lr=0.1, ns_dtype="float32", **options)
    for seed in range(1, 4):
        for name, weight in weights.items():
            weight.grad = place(seeded(name, seed))
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def sharded(_: int, options: dict[str, Any]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def place(tensor: Tensor) -> Tensor:
        local = tensor.chunk(dist.get_world_size())[dist.get_rank()]
        local = local.contiguous(memory_format=FORMAT)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    found = trained(place, **options)
    return {name: value.full_tensor().contiguous() for name, value in found.items()}


def replicated(_: int, options: dict[str, Any]) -> dict[str, Tensor]:
    return trained(
        lambda tensor: tensor.contiguous(memory_format=FORMAT),
        process_group=dist.group.WORLD,
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"post_norm": "normuon"}])
@pytest.mark.parametrize("run", [sharded, replicated])
def test_the_steps_are_those_of_one_process(world, run: Any, options: dict[str, Any]) -> None:
    expected = trained(lambda tensor: tensor, **options)
    for result in world(2).run(run, 0, options):
        for name, weight in expected.items():
            torch.testing.assert_close(result[name], weight, rtol=1e-4, atol=2e-5)
