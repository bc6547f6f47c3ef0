"""A step on several ranks never waits for an accelerator either (see tests/optim/rules)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonscale.optim.distributed.dtensor import gather_full
from muonscale.optim.muon import Muon
from tests.distributed.world import World
from tests.optim.rules.test_no_wait import NoReads, as_on_accelerator, model


def train(layout: str, steps: int, guarded: bool) -> list[Tensor]:
    """Return the weights after some steps; guarded, on an accelerator's path without reads."""
    net = model()
    group = dist.group.WORLD if layout == "ddp" else None
    if layout == "fsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = Muon(net, lr=0.02, post_norm="normuon", process_group=group)

    def step(number: int) -> None:
        torch.manual_seed(number)
        for parameter in net.parameters():
            whole = torch.randn(parameter.shape)
            gradient = torch.zeros_like(parameter)
            if layout == "fsdp":
                rows = whole.chunk(dist.get_world_size())
                own = rows[dist.get_rank()] if dist.get_rank() < len(rows) else whole[:0]
                gradient.to_local().copy_(own)  # type: ignore[attr-defined]
            else:
                gradient.copy_(whole)
            parameter.grad = gradient

    # The digest of options is read on the host: the first step compares it, as does one after a
    # change.
    step(0)
    optimizer.step()
    for number in range(1, steps):
        step(number)
        if guarded:
            with pytest.MonkeyPatch.context() as monkeypatch, as_on_accelerator(monkeypatch):
                with NoReads():
                    optimizer.step()
                optimizer.check_finite()
        else:
            optimizer.step()
    return [gather_full(parameter.detach()).clone() for parameter in net.parameters()]


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_nothing_is_read_in_a_step(world: Callable[[int], World], layout: str) -> None:
    expected, *_ = world(2).run(train, layout, 3, False)
    for found in world(2).run(train, layout, 3, True):
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other)
