"""Pipeline stages, and parameters of one optimizer on different ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from muonscale import Muon, parameter_groups
from muonscale.errors import LayoutError, MuonscaleError
from tests.distributed.layouts import SHAPES, VECTORS, gathered, make, reference, whole

STEPS = 3


class Stage(nn.Module):
    """Some layers of a model; no two stages have the same."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        width = 10 + 6 * number
        self.up = nn.Linear(8, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(x)))


def optimizer_of(stage: nn.Module) -> Muon:
    groups = parameter_groups(stage, lr=0.02, overrides={"up.weight": {"rule": "muon"}})
    return Muon(groups, ns_dtype="float32", eps=1e-4, post_norm="normuon")


def batch(step: int) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(step))


def pipeline(_: int) -> tuple[int, dict[str, Tensor], int]:
    """Train two stages of two ranks each; activations and their gradients are sent by hand."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    number, place = mesh.get_local_rank("stage"), mesh.get_local_rank("data")
    stage = Stage(number)
    for layer in (stage.up, stage.down):
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(stage, mesh=mesh["data"])
    optimizer = optimizer_of(stage)
    other = 2 * (1 - number) + place
    for step in range(STEPS + number):  # stages need not make the same number of steps
        optimizer.zero_grad()
        x = batch(step).chunk(2)[place]
        if step == STEPS:
            stage(x).square().mean().backward()
        elif number == 0:
            y = stage(x)
            dist.send(y.detach(), other)
            gradient = torch.empty_like(y)
            dist.recv(gradient, other)
            y.backward(gradient)
        else:
            x = torch.empty_like(x)
            dist.recv(x, other)
            x.requires_grad_()
            stage(x).square().mean().backward()
            assert x.grad is not None
            dist.send(x.grad, other)
        optimizer.step()
    return number, gathered(dict(stage.named_parameters())), optimizer.stats()["matrices"]


def alone() -> list[dict[str, Tensor]]:
    stages = [Stage(0), Stage(1)]
    optimizers = [optimizer_of(stage) for stage in stages]
    for step in range(STEPS + 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        last = step == STEPS
        (
            stages[1](batch(step)) if last else stages[1](stages[0](batch(step)))
        ).square().mean().backward()
        for optimizer in optimizers[last:]:
            optimizer.step()
    return [gathered(dict(stage.named_parameters())) for stage in stages]


def test_every_stage_of_a_pipeline_steps_as_on_one_process(world) -> None:
    expected = alone()
    for number, parameters, matrices in world(4).run(pipeline, 0):
        assert matrices == 2
        for name, tensor in expected[number].items():
            torch.testing.assert_close(parameters[name], tensor, rtol=1e-4, atol=2e-5)


Where = tuple[DeviceMesh, tuple[Placement, ...]]


def train(where: Callable[[DeviceMesh, str], Where | None], shape: tuple[int, ...]) -> Any:
    """Train with every parameter where `where` says; None is whole on every rank."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))

    def place(name: str, tensor: Tensor) -> Tensor:
        there = where(mesh, name)
        return tensor if there is None else distribute_tensor(tensor, *there, src_data_rank=None)

    parameters, optimizer = make(place, post_norm="normuon")
    for seed in range(1, STEPS + 1):
        for name, parameter in parameters.items():
            parameter.grad = place(name, whole(name, seed))
        optimizer.step()
    return gathered(parameters)


def experts_on_one_axis(mesh: DeviceMesh, name: str) -> Where:
    """Each outer place has the experts whole among its inner ranks; the rest is on all ranks."""
    if name == "experts":
        return mesh["inner"], (Shard(0),)
    return mesh, (Shard(0), Shard(0))


def some_on_this_rank(mesh: DeviceMesh, name: str) -> Where | None:
    """Some are on the ranks of one axis, some on all, and some are plain tensors."""
    if name in ("plain", "fused", "norm"):
        return None
    if name in ("tall", "embedding", "conv1d"):
        return mesh["inner"], (Shard(0),)
    return mesh, (Replicate(), Shard(0))


def on_both_axes(mesh: DeviceMesh, name: str) -> Where:
    """Some on the ranks of one axis, some on those of the other: neither contains the other."""
    return (mesh["inner"] if name == "tall" else mesh["outer"]), (Shard(0),)


@pytest.mark.parametrize(
    ("where", "shape"),
    [
        (experts_on_one_axis, (2, 2)),
        (some_on_this_rank, (1, 3)),
        pytest.param(experts_on_one_axis, (1, 3), marks=pytest.mark.slow),
        pytest.param(some_on_this_rank, (2, 2), marks=pytest.mark.slow),
    ],
)
def test_one_optimizer_takes_parameters_on_all_ranks_and_on_some(world, where, shape) -> None:
    expected = reference(STEPS, post_norm="normuon")
    for result in world(torch.Size(shape).numel()).run(train, where, shape):
        assert result.keys() == expected.keys() == {*SHAPES, *VECTORS}
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-4, atol=2e-5)


def refused(where: Callable[[DeviceMesh, str], Where | None]) -> str:
    with pytest.raises(LayoutError) as error:
        train(where, (2, 2))
    return str(error.value)


def test_sets_of_ranks_of_which_none_contains_the_others_are_refused(world) -> None:
    for rank, text in enumerate(world(4).run(refused, on_both_axes)):
        first = 2 * (rank // 2)
        assert f"({first}, {first + 1})" in text
        assert f"({rank % 2}, {rank % 2 + 2})" in text


def nonfinite(name: str) -> tuple[bool, str]:
    """Put a NaN on rank 3 into a gradient; return whether all is as it was, and the error."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))

    def place(name: str, tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, *experts_on_one_axis(mesh, name), src_data_rank=None)

    parameters, optimizer = make(place)
    for each, parameter in parameters.items():
        parameter.grad = place(each, whole(each, 1))
    if dist.get_rank() == 3:
        parameters[name].grad.to_local().view(-1)[0] = float("nan")
    optimizer.step()
    same = all(torch.equal(t, whole(n, 0)) for n, t in gathered(parameters).items())
    with pytest.raises(MuonscaleError) as error:
        optimizer.step()
    return same, str(error.value)


@pytest.mark.parametrize("name", ["experts", "plain"])
def test_a_nan_on_some_ranks_leaves_the_step_out_on_all(world, name: str) -> None:
    for same, text in world(4).run(nonfinite, name):
        assert same
        assert name in text
        assert "rank 3" in text
