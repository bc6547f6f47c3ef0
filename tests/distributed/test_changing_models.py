"""Parameters that join later, and state that fits in part, where state is sharded or partitioned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from muonscale import Muon, parameter_groups
from muonscale.optim.state.state_io import IncompatibleKeys
from tests.distributed.layouts import gathered
from tests.optim.conftest import Toy

LATER = ("second.weight", "norm.weight", "tokens.weight")


def build(layout: str, vocabulary: int, frozen: tuple[str, ...]) -> tuple[nn.Module, Muon]:
    torch.manual_seed(1)
    model = Toy()
    if vocabulary != 20:
        model.out = nn.Linear(8, vocabulary, bias=False)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    options: dict[str, Any] = {"process_group": dist.group.WORLD} if layout == "zero1" else {}
    return model, Muon(parameter_groups(model, lr=0.1), post_norm="normuon", **options)


def step(model: nn.Module, optimizer: Muon, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient: Tensor = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient if parameter.requires_grad else None
    optimizer.step()


def train(layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor], IncompatibleKeys]:
    model, optimizer = build(layout, 20, LATER)
    step(model, optimizer, 0)
    optimizer.unfreeze(LATER)
    step(model, optimizer, 1)
    step(model, optimizer, 2)
    saved = optimizer.full_state_dict()
    resized, other = build(layout, 30, ())
    result = other.load_state_dict(saved, strict=False)
    step(resized, other, 3)
    return (
        gathered(dict(model.named_parameters())),
        gathered(dict(resized.named_parameters())),
        result,
    )


@pytest.mark.parametrize(("layout", "size"), [("zero1", 2), ("fsdp", 2), ("fsdp", 3)])
def test_a_changing_model_is_that_of_one_process(world, layout: str, size: int) -> None:
    expected = train("one process")
    assert set(expected[2].mismatched_keys) == {"out.weight"}
    assert not expected[2].missing_keys
    for first, second, result in world(size).run(train, layout):
        assert result == expected[2]
        for found, wanted in ((first, expected[0]), (second, expected[1])):
            for name, tensor in wanted.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=5e-5)
