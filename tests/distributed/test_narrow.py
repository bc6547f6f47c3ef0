"""Parameters in 16 bits on many ranks: rounded at random, or with float32 copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from muonscale import Muon, parameter_groups
from muonscale.optim.distributed.dtensor import part_here, sharding_of, to_local
from muonscale.optim.matrices.sharding import element_numbers
from muonscale.optim.rules.master_weights import Rounding, stochastic_bfloat16
from tests.distributed.layouts import (
    SHAPES,
    VECTORS,
    gathered,
    make,
    mesh_of,
    placed,
    rows,
    whole,
)
from tests.optim.conftest import Toy

KEY = 12345
SIZES = (1, 2, 3, 4)
TABLE = [(size, row.name) for size in SIZES for row in rows(size)]


def numbered(size: int, row_name: str) -> int:
    """Compare numbers of elements with a tensor of numbers that torch has put there."""
    row = next(row for row in rows(size) if row.name == row_name)
    place = placed(row, mesh_of(row))
    elements = 0
    for name, (shape, matrices) in SHAPES.items():
        numbers = torch.arange(whole(name, 0).numel(), dtype=torch.int32).view(shape)
        there = place(name, numbers)
        layout = sharding_of(name, there, matrices)
        assert layout is not None
        part = part_here(layout)
        if part is None:
            assert torch.equal(to_local(there), numbers)
            continue
        assert torch.equal(element_numbers(*part, torch.device("cpu")), to_local(there)), name
        elements += to_local(there).numel()
    return elements


@pytest.mark.parametrize(("size", "row"), TABLE, ids=[f"{row}-{size}" for size, row in TABLE])
def test_the_elements_of_a_part_have_the_numbers_that_they_have_in_the_whole(
    world, size, row
) -> None:
    assert sum(world(size).run(numbered, size, row)) > 0


def rounded(size: int, row_name: str) -> dict[str, Tensor]:
    row = next(row for row in rows(size) if row.name == row_name)
    mesh = mesh_of(row)
    place = placed(row, mesh)
    found = {}
    for name, (_, matrices) in SHAPES.items():
        there = place(name, whole(name, 0))
        rounding = Rounding(KEY, part_here(sharding_of(name, there, matrices)))
        here = rounding.apply(to_local(there))
        again = distribute_tensor(
            stochastic_bfloat16(whole(name, 0), KEY), mesh, there.placements, src_data_rank=None
        )
        assert torch.equal(here, to_local(again)), name
        found[name] = here
    return found


@pytest.mark.parametrize("size", SIZES)
def test_parts_are_rounded_as_the_whole_is(world, size: int) -> None:
    for row in rows(size):
        results = world(size).run(rounded, size, row.name)
        assert all(tensor.dtype == torch.bfloat16 for tensor in results[0].values())
    nearest = whole("plain", 0).bfloat16()
    assert not torch.equal(stochastic_bfloat16(whole("plain", 0), KEY), nearest)


def steps(
    parameters: dict[str, Any], optimizer: Muon, place: Any, number: int = 3
) -> dict[str, Tensor]:
    for seed in range(1, number + 1):
        for name, parameter in parameters.items():
            parameter.grad = place(name, whole(name, seed).bfloat16())
        optimizer.step()
    return gathered(parameters)


def stay(name: str, tensor: Tensor) -> Tensor:
    return tensor


def narrow(size: int, row_name: str, rule: str, master: str) -> dict[str, Tensor]:
    """Train bf16 parameters, all on one rule."""
    place = stay
    if row_name != "alone":
        row = next(row for row in rows(size) if row.name == row_name)
        place = placed(row, mesh_of(row))
    parameters, optimizer = make(
        lambda name, tensor: place(name, tensor.bfloat16()), lr=1e-3, master=master
    )
    if rule == "adamw":
        group = {"params": list(parameters.items()), "rule": rule}
        optimizer = Muon([group], lr=1e-3, master=master)
    return steps(parameters, optimizer, place)


@pytest.mark.parametrize("row", ["fsdp", "columns", "tensor"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_adamw_rounds_at_random_bit_for_bit_as_on_one_process(world, size, row) -> None:
    expected = narrow(1, "alone", "adamw", "stochastic")
    for result in world(size).run(narrow, size, row, "adamw", "stochastic"):
        for name in [*SHAPES, *VECTORS]:
            assert result[name].dtype == torch.bfloat16
            assert torch.equal(result[name], expected[name]), name


@pytest.mark.parametrize("row", ["fsdp", "columns"])
def test_muon_rounds_at_random_as_on_one_process_but_for_ties(world, row: str) -> None:
    """Updates are the same but for rounding, which tips few elements to the neighbouring number."""
    expected = narrow(1, "alone", "muon", "stochastic")
    for result in world(2).run(narrow, 2, row, "muon", "stochastic"):
        other = sum(int((result[name] != expected[name]).sum()) for name in expected)
        assert other <= 0.005 * sum(tensor.numel() for tensor in expected.values())
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, rtol=2**-6, atol=1e-4)


def toy() -> Toy:
    torch.manual_seed(1)
    return Toy().bfloat16()


def ids() -> Tensor:
    return torch.arange(20).view(4, 5)


def with_copies(wrap: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters and their float32 copies."""
    model = toy()
    if wrap:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    options = {"ns_dtype": "float32", "eps": 1e-4, "master": "float32"}
    optimizer = Muon(parameter_groups(model, lr=1e-3), **options)
    for _ in range(5):
        optimizer.zero_grad()
        model(ids()).float().square().mean().backward()
        optimizer.step()
    named = dict(model.named_parameters())
    copies = {name: optimizer.state[parameter]["master"] for name, parameter in named.items()}
    return gathered(named), gathered(copies)


def test_float32_copies_of_sharded_parameters_are_those_of_one_process(world) -> None:
    expected, wide = with_copies(False)
    for parameters, copies in world(2).run(with_copies, True):
        for name, tensor in wide.items():
            assert copies[name].dtype == torch.float32
            torch.testing.assert_close(copies[name], tensor, rtol=1e-4, atol=1e-5)
            assert torch.equal(parameters[name], copies[name].bfloat16())
            assert parameters[name].dtype == expected[name].dtype
    start = dict(toy().named_parameters())["up.weight"]
    assert not torch.equal(wide["up.weight"].bfloat16().float(), wide["up.weight"])
    assert not torch.equal(expected["up.weight"], start)
