"""The average of sharded weights is that of the whole ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonscale.lab.training.average import WeightAverage
from muonscale.optim.distributed.dtensor import gather_full
from tests.distributed.world import World


def averaged(*, sharded: bool) -> list[dict[str, Tensor]]:
    """Return the weights after some updates, the average in their place, and the weights again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    average = WeightAverage(model, decay=0.8, first=1)
    for step in range(1, 5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.1 * step)
        average.update(step)

    def whole() -> dict[str, Tensor]:
        return {name: gather_full(p.detach()).clone() for name, p in model.named_parameters()}

    found = [whole()]
    with average.in_place():
        found.append(whole())
    return [*found, whole()]


@pytest.mark.parametrize("size", [2, 3])
def test_shards(world: Callable[[int], World], size: int) -> None:
    (expected,) = world(1).run(averaged_alone)
    for rank in world(size).run(averaged_sharded):
        for own, other in zip(rank, expected, strict=True):
            for name, tensor in other.items():
                assert torch.equal(own[name], tensor)


def averaged_alone() -> list[dict[str, Tensor]]:
    return averaged(sharded=False)


def averaged_sharded() -> list[dict[str, Tensor]]:
    return averaged(sharded=True)
