"""What must be the same on all ranks: if it is not, all ranks say what differs, and none waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from muonscale import Muon
from muonscale.errors import ConfigError, GroupingError, LayoutError, MuonscaleError
from tests.distributed.world import World

LAYOUTS = ["fsdp", "ddp", "fsdp_tensor"]
"""Sharded rows; replicas; and two sets of ranks, of which the smaller differs between ranks."""
SHAPES = {"hidden": (12, 8), "other": (8, 8), "norm": (8,), "embedding": (10, 8)}
ODD = 1
"""The rank that has something else."""

Change = Callable[[dict[str, Any], Muon], None]


def _make(layout: str, given: dict[str, Any]) -> tuple[dict[str, Any], Muon]:
    """Return parameters with gradients, and an optimizer with more options, or one fewer to drop."""
    size = dist.get_world_size()
    mesh_shape = (2, 2) if layout == "fsdp_tensor" else (size,)
    mesh = init_device_mesh(
        "cpu", mesh_shape, mesh_dim_names=("shard", "tensor")[: len(mesh_shape)]
    )
    parameters: dict[str, Any] = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(number)
        whole = torch.randn(2, *shape, generator=generator)

        def place(tensor: Tensor, name: str = name) -> Tensor:
            placements: list[Placement] = [Shard(0)]
            if layout == "ddp":
                return tensor.clone()
            if layout == "fsdp_tensor" and name in ("norm", "other"):
                return distribute_tensor(tensor, mesh["shard"], placements, src_data_rank=None)
            if layout == "fsdp_tensor":
                placements.append(Shard(1))
            return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

        parameters[name] = nn.Parameter(place(whole[0]))
        parameters[name].grad = place(whole[1])
    drop = given.pop("drop", None)
    groups = [
        {
            "rule": rule,
            "params": [parameters[name] for name in names if name != drop],
            "param_names": [name for name in names if name != drop],
        }
        for rule, names in (("muon", ["hidden", "other"]), ("adamw", ["norm", "embedding"]))
    ]
    options: dict[str, Any] = {"lr": 0.1, "ns_dtype": "float32"}
    if layout == "ddp":
        options["process_group"] = dist.group.WORLD
    return parameters, Muon(groups, **(options | given))


def _caught(step: Callable[[], Any]) -> tuple[type[Exception], str]:
    try:
        step()
    except MuonscaleError as error:
        return type(error), str(error)
    raise AssertionError("nothing was raised")


def _options_differ(layout: str, given: dict[str, Any]) -> tuple[type[Exception], str]:
    """Return the error of a first step, and check that ranks are still in step after it."""
    odd = dist.get_rank() == ODD
    _, optimizer = _make(layout, dict(given) if odd else {})
    error = _caught(optimizer.step)
    _check_in_step(layout)
    return error


def _check_in_step(layout: str) -> None:
    parameters, optimizer = _make(layout, {})
    optimizer.step()
    assert parameters["hidden"].shape == SHAPES["hidden"]


def _changed_later(layout: str, change: Change) -> tuple[type[Exception], str]:
    """Return the error of the third step, before which the odd rank changes something."""
    parameters, optimizer = _make(layout, {})
    optimizer.step()
    optimizer.step()
    before = [p.detach().clone() for p in parameters.values()]
    if dist.get_rank() == ODD:
        change(parameters, optimizer)
    error = _caught(optimizer.step)
    for old, parameter in zip(before, parameters.values(), strict=True):
        if old.shape == parameter.shape:
            assert torch.equal(_local(old), _local(parameter))  # nothing was written
    _check_in_step(layout)
    return error


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _check(errors: list[Any], kind: type[Exception], *words: str) -> None:
    assert {error for error, _ in errors} == {kind}
    assert len({text for _, text in errors}) == 1, "all ranks say the same"
    for word in words:
        assert word in errors[0][1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("option", "other", "shown"),
    [
        ("lr", 0.2, ("0.1", "0.2")),
        ("weight_decay", 0.3, ("0.1", "0.3")),
        ("momentum", 0.5, ("0.95", "0.5")),
        ("betas", (0.8, 0.9), ("0.95", "0.8")),
        ("post_norm", "row", ("None", "row")),
        ("post_norm", "normuon", ("None", "normuon")),
        ("comm_dtype", "bfloat16", ("float32", "bfloat16")),
        ("ns_steps", 3, ("5", "3")),
        ("nonfinite", "skip", ("raise", "skip")),
        ("scale", abs, ("rms", "abs")),
    ],
)
def test_all_ranks_name_an_option_that_differs(
    world: Callable[[int], World], layout: str, option: str, other: Any, shown: tuple[str, str]
) -> None:
    size = 4 if layout == "fsdp_tensor" else 3
    errors = world(size).run(_options_differ, layout, {option: other})
    _check(errors, ConfigError, option, f"rank {ODD}", *shown)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["hidden", "norm", "embedding"])
def test_all_ranks_name_a_parameter_that_one_of_them_lacks(
    world: Callable[[int], World], layout: str, name: str
) -> None:
    size = 4 if layout == "fsdp_tensor" else 3
    errors = world(size).run(_options_differ, layout, {"drop": name})
    _check(errors, LayoutError, name, f"rank {ODD}")


def _lower_lr(parameters: dict[str, Any], optimizer: Muon) -> None:
    optimizer.param_groups[0]["lr"] = 0.01


def _lower_momentum(parameters: dict[str, Any], optimizer: Muon) -> None:
    optimizer.param_groups[0]["momentum"] = 0.5


def _sparse(parameters: dict[str, Any], optimizer: Muon) -> None:
    parameters["embedding"].grad = parameters["embedding"].grad.to_sparse()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("change", "option"), [(_lower_lr, "lr"), (_lower_momentum, "momentum")])
def test_an_option_that_changes_on_one_rank_is_noticed_at_the_next_step(
    world: Callable[[int], World], layout: str, change: Change, option: str
) -> None:
    size = 4 if layout == "fsdp_tensor" else 3
    _check(world(size).run(_changed_later, layout, change), ConfigError, option, f"rank {ODD}")


def test_a_sparse_gradient_on_one_rank_stops_all(world: Callable[[int], World]) -> None:
    errors = world(3).run(_changed_later, "ddp", _sparse)
    _check(errors, GroupingError, "embedding", "sparse", f"rank {ODD}")


def _resize(parameters: dict[str, Any], optimizer: Muon) -> None:
    parameters["hidden"].data = torch.zeros(3, 3)
    parameters["hidden"].grad = torch.zeros(3, 3)


def test_a_parameter_resized_on_one_rank_stops_all(world: Callable[[int], World]) -> None:
    errors = world(3).run(_changed_later, "ddp", _resize)
    _check(errors, LayoutError, "hidden", "(3, 3)", f"rank {ODD}")


def _shards_of_another_shape(post_norm: str | None) -> tuple[type[Exception], str]:
    """A DTensor of which one rank holds more rows than its placements say."""
    mesh = init_device_mesh("cpu", (3,))
    parameter = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)], src_data_rank=None)
    if dist.get_rank() == ODD:
        parameter._local_tensor = torch.ones(3, 4)
    parameter = nn.Parameter(parameter)
    parameter.grad = torch.ones_like(parameter)
    optimizer = Muon([("hidden", parameter)], post_norm=post_norm)
    error = _caught(optimizer.step)
    _check_in_step("fsdp")
    return error


@pytest.mark.parametrize("post_norm", [None, "normuon"])
def test_what_one_rank_refuses_all_refuse(
    world: Callable[[int], World], post_norm: str | None
) -> None:
    errors = world(3).run(_shards_of_another_shape, post_norm)
    _check(errors, LayoutError, "hidden", "(3, 4)", "(2, 4)", f"rank {ODD}")


def _other_placements() -> tuple[type[Exception], str]:
    mesh = init_device_mesh("cpu", (3,))
    placement = Replicate() if dist.get_rank() == ODD else Shard(0)
    parameter = nn.Parameter(
        distribute_tensor(torch.ones(6, 4), mesh, [placement], src_data_rank=None)
    )
    parameter.grad = torch.ones_like(parameter)
    error = _caught(Muon([("hidden", parameter)]).step)
    _check_in_step("fsdp")
    return error


def test_a_sharding_that_differs_stops_all(world: Callable[[int], World]) -> None:
    errors = world(3).run(_other_placements)
    _check(errors, LayoutError, "hidden", "Replicate", "Shard", f"rank {ODD}")


def _column_without_ranks() -> tuple[type[Exception], str]:
    """Two ranks of tensor parallelism and one column: FSDP flattens what the second one lacks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    module = nn.Linear(1, 9, bias=False)
    placed = distribute_tensor(module.weight.data, mesh["tensor"], [Shard(1)], src_data_rank=None)
    module.weight = nn.Parameter(placed)
    fully_shard(module, mesh=mesh["shard"])
    module.weight.grad = torch.zeros_like(module.weight)
    error = _caught(Muon([("hidden", module.weight)]).step)
    _check_in_step("fsdp")
    return error


def test_fewer_columns_than_ranks_are_refused_on_all(world: Callable[[int], World]) -> None:
    errors = world(4).run(_column_without_ranks)
    _check(errors, LayoutError, "hidden", "(9, 1)", "at least as many")


def _destroyed_group() -> list[tuple[type[Exception], str]]:
    group = dist.new_group([0, 1, 2])
    parameter = nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.ones(4, 4)
    optimizer = Muon([("hidden", parameter)], process_group=group)
    optimizer.step()
    dist.barrier()
    dist.destroy_process_group(group)
    errors = [
        _caught(optimizer.step),
        _caught(optimizer.full_state_dict),
        _caught(lambda: Muon([("hidden", parameter)], process_group=group)),
        _caught(lambda: Muon([("hidden", parameter)], process_group="world")),  # type: ignore[arg-type]
    ]
    _check_in_step("ddp")
    return errors


def test_a_group_that_does_not_exist_is_refused(world: Callable[[int], World]) -> None:
    for errors in world(3).run(_destroyed_group):
        for kind, text in errors:
            assert kind is LayoutError
            assert "destroy_process_group" in text


def _other_mesh() -> tuple[type[Exception], str] | None:
    mesh = DeviceMesh("cpu", [0, 1])
    rank = dist.get_rank()
    local = torch.ones(2 if rank < 2 else 0, 4)
    parameter = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
    if rank < 2:
        parameter.grad = torch.ones_like(parameter)
        Muon([("hidden", parameter)]).step()
        return None
    return _caught(Muon([("hidden", parameter)]).step)


def test_a_parameter_on_a_mesh_without_this_rank_is_refused(world: Callable[[int], World]) -> None:
    first, second, third = world(3).run(_other_mesh)
    assert first is None and second is None
    assert third[0] is LayoutError
    for word in ("hidden", "[0, 1]", "rank 2"):
        assert word in third[1]
