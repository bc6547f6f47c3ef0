"""Every row of the layout table, for every kind of rule, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.layouts import (
    RULES,
    SIZES,
    STEPS,
    TOLERANCES,
    gathered,
    make,
    mesh_of,
    placed,
    reference,
    rows,
    whole,
)


def train(size: int, name: str, steps: int, options: dict[str, Any]) -> dict[str, Tensor]:
    row = next(row for row in rows(size) if row.name == name)
    place = placed(row, mesh_of(row))
    parameters, optimizer = make(place, **options)
    for seed in range(1, steps + 1):
        for parameter_name, parameter in parameters.items():
            parameter.grad = place(parameter_name, whole(parameter_name, seed))
        optimizer.step()
    return gathered(parameters)


FAST = {
    "muon": {(2, "fsdp"), (3, "columns"), (4, "fsdp_tensor")},
    "muon_plus": {(2, "tensor"), (3, "fsdp"), (4, "hsdp")},
    "normuon": {
        (1, "fsdp"),
        *((2, row.name) for row in rows(2)),
        (3, "columns"),
        (4, "hsdp"),
        (4, "fsdp_tensor"),
        (4, "experts_fsdp"),
    },
    "weight_norm": {
        *((2, row.name) for row in rows(2)),
        (4, "hsdp"),
        (4, "fsdp_tensor"),
        (4, "experts_fsdp"),
    },
    "dion2": {(2, "tensor"), (3, "fsdp"), (4, "fsdp_tensor")},
    "muown": {
        (1, "fsdp"),
        *((2, row.name) for row in rows(2)),
        (4, "hsdp"),
        (4, "fsdp_tensor"),
        (4, "experts_fsdp"),
    },
    "radial_brake": {(2, "tensor"), (3, "fsdp"), (4, "hsdp")},
    "aurora": {(2, "tensor"), (3, "fsdp"), (4, "experts_fsdp")},
    "adamuon": {
        *((2, row.name) for row in rows(2)),
        (4, "hsdp"),
        (4, "fsdp_tensor"),
        (4, "experts_fsdp"),
    },
    "muon2": {(2, "experts"), (3, "fsdp"), (4, "hsdp")},
    "muoneq": {(2, "tensor"), (3, "columns"), (4, "fsdp_tensor")},
}
"""Every row of the table and every rule; the slow tests have all of both."""


def table() -> list[Any]:
    """Return all rows of the table for all rules, marked as fast and slow."""
    return [
        pytest.param(
            size,
            row.name,
            rule,
            id=f"{row.name}-{size}-{rule}",
            marks=() if (size, row.name) in FAST[rule] else pytest.mark.slow,
        )
        for size in SIZES
        for row in rows(size)
        for rule in RULES
    ]


@pytest.mark.parametrize(("size", "row", "rule"), table())
def test_every_layout_gives_the_parameters_of_one_process(world, size, row, rule) -> None:
    results = world(size).run(train, size, row, STEPS, RULES[rule])
    expected = reference(STEPS, **RULES[rule])
    for result in results:
        for name in expected:
            torch.testing.assert_close(result[name], expected[name], **TOLERANCES)
