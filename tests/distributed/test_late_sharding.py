"""An optimizer that was made before `fully_shard` would train parameters that no longer count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonscale import Muon, parameter_groups
from muonscale.errors import GroupingError
from tests.distributed.world import World


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11))


def _train(model: nn.Module, optimizer: Muon, set_to_none: bool) -> None:
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        model(torch.arange(11)).square().mean().backward()
        optimizer.step()


def late(params: str, trained_before: bool) -> str:
    """Return the error, or the warning, of the first step after `fully_shard`."""
    model = _model()
    given = {
        "model": lambda: model,
        "groups": lambda: parameter_groups(model, lr=0.1),
        "parameters": lambda: [
            {"params": [model[1].weight], "rule": "muon"},
            {
                "params": [p for p in model.parameters() if p is not model[1].weight],
                "rule": "adamw",
            },
        ],
    }[params]()
    optimizer = Muon(given, lr=0.1)
    if trained_before:  # gradients of the old parameters stay, as zeros
        _train(model, optimizer, set_to_none=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    # without the model nobody can know which parameters replaced those of the groups
    kind = UserWarning if params == "parameters" else GroupingError
    with pytest.raises(kind) as error:
        _train(model, optimizer, set_to_none=True)
    return str(error.value)


@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("params", ["model", "groups", "parameters"])
def test_an_optimizer_from_before_fully_shard_says_so(
    world: Callable[[int], World], params: str, trained_before: bool
) -> None:
    for text in world(2).run(late, params, trained_before):
        assert "fully_shard" in text
