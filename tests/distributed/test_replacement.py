"""Parameters that are replaced by sharded ones after the optimizer was made, as Accelerate does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from muonscale import Muon, parameter_groups
from tests.distributed.layouts import gathered
from tests.distributed.test_models import BATCHES, RULES, check, shard_layers, share
from tests.optim.conftest import causal_lm

OPTIONS = {"ns_dtype": "float32", "eps": 1e-4}


def step(model: nn.Module, optimizer: Muon, ids: Tensor) -> None:
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()


def build(rule: str) -> tuple[nn.Module, Muon]:
    model = causal_lm("llama_tied").eval()
    return model, Muon(parameter_groups(model, lr=0.02), **OPTIONS, **RULES[rule])


def states(model: nn.Module, optimizer: Muon) -> dict[str, Tensor]:
    """Return all state, gathered, under names of its own."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value
    return gathered(found)


def alone(rule: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, optimizer = build(rule)
    for _ in range(3):
        step(model, optimizer, BATCHES["many"]())
    return gathered(dict(model.named_parameters())), states(model, optimizer)


def replaced(rule: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make one step on plain parameters and two on those that `fully_shard` puts in their place."""
    model, optimizer = build(rule)
    step(model, optimizer, BATCHES["many"]())
    before = {parameter: name for name, parameter in model.named_parameters()}
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[: len(shape)])
    shard_layers(model, mesh)
    after = dict(model.named_parameters())
    for group in optimizer.param_groups:
        for number, parameter in enumerate(group["params"]):
            group["params"][number] = after[before[parameter]]
    for _ in range(2):
        step(model, optimizer, share(BATCHES["many"](), mesh))
    assert len(optimizer.state) == len(after)  # nothing is left of those that are gone
    for name, parameter in after.items():
        moment = optimizer.state[parameter].get("momentum_buffer")
        if moment is not None:
            assert isinstance(moment, DTensor), name
            assert moment.placements == parameter.placements, name
    return gathered(after), states(model, optimizer)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((2,), "muon"),
        ((2, 2), "normuon"),
        *(pytest.param(shape, "normuon", marks=pytest.mark.slow) for shape in ((2,), (3,))),
    ],
)
def test_state_follows_parameters_that_are_sharded_after_a_step(world, shape, rule) -> None:
    results = world(torch.Size(shape).numel()).run(replaced, rule, shape)
    parameters, state = alone(rule)
    check([result for result, _ in results], parameters)
    check([result for _, result in results], state)


def handed_back(rule: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make a step on sharded parameters, and two on plain ones that take their place."""
    model, _ = build(rule)
    twin = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard_layers(model, mesh)
    optimizer = Muon(parameter_groups(model, lr=0.02), **OPTIONS, **RULES[rule])
    step(model, optimizer, share(BATCHES["many"](), mesh))
    whole = gathered(dict(model.named_parameters()))
    twin.load_state_dict(whole, strict=False)
    twin.tie_weights()  # type: ignore[operator]
    plain = dict(twin.named_parameters())
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [plain[names[parameter]] for parameter in group["params"]]
    for _ in range(2):
        step(twin, optimizer, BATCHES["many"]())
    return gathered(plain), states(twin, optimizer)


def test_state_follows_parameters_that_are_made_whole_again(world) -> None:
    results = world(2).run(handed_back, "normuon")
    parameters, state = alone("normuon")
    check([result for result, _ in results], parameters)
    check([result for _, result in results], state)
