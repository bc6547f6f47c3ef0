"""What travels, and in which dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from muonscale.optim import step
from muonscale.optim.distributed.assignment import row_traffic, traffic
from muonscale.optim.distributed.consensus import total
from muonscale.optim.matrices.local import LocalMatrices
from muonscale.optim.rules import MUON
from tests.distributed.layouts import SHAPES, gathered, make, mesh_of, placed, rows, whole

LR = 0.1
STEPS = 3


def train(row_name: str, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters, and the bytes that this rank has sent for Muon."""
    size = torch.distributed.get_world_size()
    row = next(row for row in rows(size) if row.name == row_name)
    place = placed(row, mesh_of(row))
    parameters, optimizer = make(lambda name, t: place(name, t.to(dtype)), lr=LR, **options)
    for seed in range(1, STEPS + 1):
        for name, parameter in parameters.items():
            parameter.grad = place(name, whole(name, seed).to(dtype))
        optimizer.step()
    domains = optimizer._context.rank_groups(optimizer.param_groups, MUON)
    return {
        "parameters": gathered(parameters),
        "bytes": sum(domain.log.bytes_sent for domain in domains),
    }


def one_process(dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    parameters, optimizer = make(lambda _, tensor: tensor.to(dtype), lr=LR, **options)
    for seed in range(1, STEPS + 1):
        for name, parameter in parameters.items():
            parameter.grad = whole(name, seed).to(dtype)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize(
    ("size", "row"),
    [
        *((1, "fsdp"), (2, "columns"), (3, "tensor")),
        *(pytest.param(size, "fsdp", marks=pytest.mark.slow) for size in (2, 3)),
    ],
)
def test_with_bfloat16_under_way_many_processes_do_what_one_does(world, size, row) -> None:
    results = world(size).run(train, row, torch.float32, {"comm_dtype": "bfloat16"})
    expected = one_process(torch.float32, comm_dtype="bfloat16")
    wide = one_process(torch.float32)
    for name, tensor in expected.items():
        # An update that lies between two bfloat16 numbers may become either: up to 1/128 of it.
        ulp = STEPS * LR * 2**-7
        for result in results:
            difference = (result["parameters"][name] - tensor).abs()
            assert float(difference.max()) <= ulp, name
            assert float((difference > 1e-5).float().mean()) < 0.02, name
    apart = [name for name in expected if not torch.allclose(expected[name], wide[name], atol=1e-5)]
    assert "plain" in apart  # the option does something on one process too


def test_bfloat16_under_way_is_half_the_bytes_of_float32(world) -> None:
    for size in (2, 3):
        narrow = world(size).run(train, "fsdp", torch.float32, {"comm_dtype": "bfloat16"})
        wide = world(size).run(train, "fsdp", torch.float32, {})
        sums = [sum(result["bytes"] for result in results) for results in (narrow, wide)]
        assert sums[1] == 2 * sums[0] > 0


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({"second_moment": "update"}, 2),
        ({"second_moment": "update", "comm_dtype": "bfloat16"}, 1.5),
        ({"second_moment": "gradient", "pre_norm": "row", "constraint": "weight_norm"}, 1),
    ],
)
def test_only_state_of_matrices_is_sent_with_them(world, options, times: float) -> None:
    """In float32, whatever the dtype of directions and updates; plan says the same."""
    both = [world(2).run(train, "fsdp", torch.float32, one) for one in ({}, options)]
    sums = [sum(result["bytes"] for result in results) for results in both]
    assert sums[1] == times * sums[0] > 0


def counted(row_name: str, options: dict[str, Any]) -> tuple[int, int, int]:
    """Return the bytes that this rank has sent in a step, what `plan` counts, and sums of rows."""
    row = next(row for row in rows(torch.distributed.get_world_size()) if row.name == row_name)
    place = placed(row, mesh_of(row))
    parameters, optimizer = make(place, **options)
    for name, parameter in parameters.items():
        parameter.grad = place(name, whole(name, 1))
    summed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "total", lambda x, group: summed.append(x.numel()) or total(x, group))
        optimizer.step()
    (domain,) = optimizer._context.rank_groups(optimizer.param_groups, MUON)
    (update,) = {member.update for member in domain.members}
    each = dict.fromkeys(domain.names, len(update.row_states))
    here = domain.assignment.ranks.index(torch.distributed.get_rank())
    sides = traffic(domain.assignment), row_traffic(domain.assignment, each)
    values = sum(side.sent(here) for side in sides)
    return domain.log.bytes_sent, 4 * values, sum(summed)


@pytest.mark.parametrize("row", ["fsdp", "columns", "tensor"])
def test_state_of_rows_is_counted_as_it_is_sent(world, row: str) -> None:
    for sent, stated, _ in world(2).run(
        counted, row, {"row_fraction": 0.5, "post_norm": "normuon"}
    ):
        assert sent == stated > 0


def test_sums_of_rows_are_sent_only_where_rows_are_divided(world) -> None:
    rows_of = {name: LocalMatrices(*SHAPES[name]).rows for name in SHAPES}
    tall = {name: count for name, count in rows_of.items() if SHAPES[name][1].transposed}
    for row, expected in (
        ("fsdp", sum(tall.values())),
        ("columns", sum(rows_of.values()) - sum(tall.values())),
    ):
        for sent, stated, summed in world(2).run(counted, row, {"constraint": "row_magnitude"}):
            assert sent == stated
            # two sums before the momentum, two after the update, and one of squares for `stats`
            assert summed == 4 * expected + 1


@pytest.mark.parametrize(
    ("row", "wire"),
    [
        ("fsdp", "bfloat16"),
        ("columns", "float32"),
        pytest.param("fsdp", "float32", marks=pytest.mark.slow),
        pytest.param("columns", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_float64_parameters_stay_float64_on_the_way(world, row: str, wire: str) -> None:
    options = {"comm_dtype": wire, "ns_dtype": "float64", "post_norm": "normuon"}
    expected = one_process(torch.float64, **options)
    for result in world(3).run(train, row, torch.float64, options):
        for name, tensor in expected.items():
            assert result["parameters"][name].dtype == torch.float64
            torch.testing.assert_close(result["parameters"][name], tensor, rtol=1e-10, atol=1e-10)
