"""What travels arrives bit for bit: pieces to whole matrices, and whole matrices to pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.optim.distributed.assignment import (
    OwnerAssignment,
    ParamCost,
    assign_owners,
    shapes_of,
)
from muonscale.optim.distributed.dtensor import sharding_of, to_local
from muonscale.optim.distributed.exchange import Exchange, Payload
from muonscale.optim.matrices.sharding import Sharding
from muonscale.optim.matrices.spec import view
from tests.distributed.layouts import SHAPES, mesh_of, placed, rows, whole


def planned(name: str, sharding: Sharding) -> ParamCost:
    flops = tuple(out * in_ for out, in_ in shapes_of(sharding))
    return ParamCost(
        name=name,
        sharding=sharding,
        kind="k",
        flops=flops,
        triples=((2.0, -1.5, 0.5),),
        forms=((1,),),
    )


def setup(row_name: str, subgroup_size: int) -> tuple[OwnerAssignment, Payload, dict[str, Tensor]]:
    row = next(row for row in rows(dist.get_world_size()) if row.name == row_name)
    place = placed(row, mesh_of(row))
    tensors: dict[str, Tensor] = {}
    members = []
    for name, (_, matrices) in SHAPES.items():
        there = place(name, whole(name, 7))
        sharding = sharding_of(name, there, matrices)
        assert sharding is not None
        members.append(planned(name, sharding))
        tensors[name] = to_local(there).clone()
    assignment = assign_owners(
        members, subgroup_size=subgroup_size, subgroup_flops_per_byte=0, round_bytes=1000
    )
    payload = Payload(
        assignment,
        [p.sharding for p in assignment.parameters],
        Exchange(dist.group.WORLD, dist.get_rank()),
        comm_dtype=torch.float32,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return assignment, payload, tensors


def there_and_back(row_name: str, subgroup_size: int) -> tuple[int, int]:
    """Compare what arrives with the matrices; send twice it back, and compare again."""
    assignment, payload, tensors = setup(row_name, subgroup_size)
    alone: dict[str, list[Any]] = {
        name: [m for batch in view(whole(name, 7), matrices) for m in batch]
        for name, (_, matrices) in SHAPES.items()
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    arrived = 0
    for number in range(assignment.rounds):
        collected = payload.collect(number, tensors, SHAPES)
        batches = payload.assemble(number, collected, {}, SHAPES)
        for batch in batches.values():
            for task, values in zip(batch.tasks, batch.values.unbind(), strict=True):
                expected = alone[assignment.parameters[task.parameter].name][task.matrix]
                assert torch.equal(values, expected[slice(*task.rows), slice(*task.columns)])
                arrived += values.numel()
            batch.values.mul_(2)
        payload.deliver(payload.distribute(number, batches, SHAPES), tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, 2 * before[name]), name
    return arrived, assignment.rounds


TABLE = [(size, row.name, 1) for size in (1, 2, 3, 4) for row in rows(size)]
TABLE += [(3, "fsdp", 3), (4, "hsdp", 2), (4, "fsdp_tensor", 4), (4, "experts_fsdp", 2)]


@pytest.mark.parametrize(("size", "row", "team"), TABLE)
def test_what_is_sent_arrives_exactly(world, size: int, row: str, team: int) -> None:
    answers = world(size).run(there_and_back, row, team)
    elements = sum(whole(name, 7).numel() for name in SHAPES)
    assert sum(arrived for arrived, _ in answers) == elements
    assert all(rounds > 1 for _, rounds in answers)
