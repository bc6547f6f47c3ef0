"""FSDP over tensor parallelism where the ranks do not divide the rows: 3 x 2 and 25 rows.

torch's own wrappers shard the parameters, and hold something else than the placements say.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from muonscale import Muon
from muonscale.lab.training.background_save import Stager
from muonscale.optim.distributed.shard_block import with_shard_blocks
from muonscale.optim.matrices.spec import MatrixSpec
from tests.distributed.layouts import RULES, TOLERANCES, gathered
from tests.distributed.world import World

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "rows": ((25, 8), 0),
    "seven": ((7, 12), 0),
    "split": ((25, 8), 0),
    "columns": ((8, 13), 1),
    "embedding": ((37, 6), 0),
    "bias": ((19,), 0),
}
"""Shape, and axis of tensor parallelism."""
SPLITS = {"split": MatrixSpec(splits=(11, 14))}


def _whole(name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + list(SHAPES).index(name))
    return torch.randn(SHAPES[name][0], generator=generator)


def _sharded(seed: int) -> dict[str, Any]:
    """Return parameters as parallelize_module and fully_shard make them."""
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("shard", "tensor"))
    module = nn.Module()
    for name, (_, axis) in SHAPES.items():
        whole = _whole(name, seed)
        placed = distribute_tensor(whole, mesh["tensor"], [Shard(axis)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(placed))
    fully_shard(module, mesh=mesh["shard"])
    return dict(module.named_parameters())


def _optimizer(parameters: dict[str, Any], rule: str) -> Muon:
    on_adamw = ["embedding", "bias"]
    on_muon = [name for name in SHAPES if name not in on_adamw]
    groups = [
        {
            "rule": kind,
            "params": [parameters[name] for name in names],
            "param_names": names,
            "matrices": SPLITS if kind == "muon" else {},
        }
        for kind, names in (("muon", on_muon), ("adamw", on_adamw))
    ]
    return Muon(groups, lr=0.1, ns_dtype="float32", **RULES[rule])


def _step(parameters: dict[str, Any], optimizer: Muon, seeds: range) -> None:
    for seed in seeds:
        gradients = _sharded(seed)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].detach()
        optimizer.step()


def _alone(rule: str, seeds: range) -> tuple[dict[str, Tensor], Muon]:
    parameters = {name: nn.Parameter(_whole(name, 0)) for name in SHAPES}
    optimizer = _optimizer(parameters, rule)
    for seed in seeds:
        for name, parameter in parameters.items():
            parameter.grad = _whole(name, seed)
        optimizer.step()
    return parameters, optimizer


def train(rule: str) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    parameters = _sharded(0)
    optimizer = _optimizer(parameters, rule)
    _step(parameters, optimizer, range(1, 4))
    full = optimizer.full_state_dict()["state"]
    return gathered(parameters), {n: {k: v.clone() for k, v in s.items()} for n, s in full.items()}


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_one_process(world: Callable[[int], World], rule: str) -> None:
    expected, optimizer = _alone(rule, range(1, 4))
    state = optimizer.state_dict()["state"]
    for parameters, full in world(6).run(train, rule):
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, expected[name].detach(), **TOLERANCES)
        for number, values in state.items():
            for key, value in values.items():
                torch.testing.assert_close(full[number][key], value, **TOLERANCES)


def resume_full(state: dict[str, Any], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Load the state of one process, and go on for a step."""
    parameters = _sharded(0)
    optimizer = _optimizer(parameters, "normuon")
    with torch.no_grad():
        for name, parameter in parameters.items():
            everywhere = distribute_tensor(values[name], parameter.device_mesh, src_data_rank=None)
            parameter.copy_(everywhere.redistribute(placements=parameter.placements))
    optimizer.load_state_dict(state)
    _step(parameters, optimizer, range(3, 4))
    return gathered(parameters)


def test_state_of_one_process_goes_on_sharded(world: Callable[[int], World]) -> None:
    parameters, optimizer = _alone("normuon", range(1, 3))
    values = {name: p.detach() for name, p in parameters.items()}
    expected, _ = _alone("normuon", range(1, 4))
    for result in world(6).run(resume_full, optimizer.state_dict(), values):
        for name, parameter in result.items():
            torch.testing.assert_close(parameter, expected[name].detach(), **TOLERANCES)


def save(folder: str, background: bool) -> None:
    parameters = _sharded(0)
    optimizer = _optimizer(parameters, "normuon")
    _step(parameters, optimizer, range(1, 3))
    state = _by_name(parameters, optimizer)
    if not background:
        dcp.save(with_shard_blocks(state), checkpoint_id=folder)
        return
    group = dist.new_group(backend="gloo")
    saving: Any = dcp.async_save(
        state, checkpoint_id=folder, async_stager=Stager(), process_group=group
    )
    _step(parameters, optimizer, range(3, 5))  # while it is written
    saving.result()


def load(folder: str) -> dict[str, Tensor]:
    parameters = _sharded(5)
    optimizer = _optimizer(parameters, "normuon")
    dcp.load(with_shard_blocks(_by_name(parameters, optimizer)), checkpoint_id=folder)
    _step(parameters, optimizer, range(3, 4))
    return gathered(parameters)


def _by_name(parameters: dict[str, Any], optimizer: Muon) -> dict[str, Any]:
    state = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    return {"model": {n: p.detach() for n, p in parameters.items()}, "state": state}


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_is_loaded_sharded_and_in_one_process(
    world: Callable[[int], World], background: bool, tmp_path: Path
) -> None:
    world(6).run(save, str(tmp_path), background)
    expected, _ = _alone("normuon", range(1, 4))
    for result in world(6).run(load, str(tmp_path)):
        for name, parameter in result.items():
            torch.testing.assert_close(parameter, expected[name].detach(), **TOLERANCES)
    parameters = {name: nn.Parameter(_whole(name, 5)) for name in SHAPES}
    optimizer = _optimizer(parameters, "normuon")
    dcp.load(_by_name(parameters, optimizer), checkpoint_id=str(tmp_path), no_dist=True)
    before, trained = _alone("normuon", range(1, 3))
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, before[name], **TOLERANCES)
        for key, value in optimizer.state[parameter].items():
            torch.testing.assert_close(value, trained.state[before[name]][key], **TOLERANCES)


def step_with_partial() -> dict[str, Tensor]:
    """Gradients that are still sums over the ranks of tensor parallelism."""
    parameters = _sharded(0)
    optimizer = _optimizer(parameters, "muon")
    for name, parameter in parameters.items():
        share = _whole(name, 1) / 6
        placements = [Partial(), Partial()]
        parameter.grad = DTensor.from_local(share, parameter.device_mesh, placements)
    optimizer.step()
    return gathered(parameters)


def test_partial_gradients_are_reduced_to_what_each_rank_holds(
    world: Callable[[int], World],
) -> None:
    expected, _ = _alone("muon", range(1, 2))
    for result in world(6).run(step_with_partial):
        for name, parameter in result.items():
            torch.testing.assert_close(parameter, expected[name].detach(), **TOLERANCES)
