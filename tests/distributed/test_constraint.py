"""A constraint made up here, which depends on the sums themselves: every layout has the same sums."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.optim.rules.constraint import CONSTRAINTS, Constraint, MatrixSums
from tests.distributed.layouts import gathered, make, mesh_of, placed, rows, whole


def _capped(sums: MatrixSums, group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Shorten long updates, and weights that agree with them. No ratio of sums, as others are."""
    return 1 / (1 + sums.product.square() / 100), float(group["lr"]) / (1 + sums.update)


@contextmanager
def installed() -> Generator[None]:
    CONSTRAINTS["capped"] = Constraint(factors=_capped, source="this test")
    try:
        yield
    finally:
        del CONSTRAINTS["capped"]


def train(row_name: str) -> dict[str, Tensor]:
    """Train with a layout of the table, or "alone"."""

    def place(name: str, tensor: Tensor) -> Tensor:
        return tensor

    if row_name != "alone":
        row = next(row for row in rows(dist.get_world_size()) if row.name == row_name)
        place = placed(row, mesh_of(row))
    with installed():
        parameters, optimizer = make(place, constraint="capped")
        for seed in (1, 2):
            for name, parameter in parameters.items():
                parameter.grad = place(name, whole(name, seed))
            optimizer.step()
    return gathered(parameters)


@pytest.mark.parametrize("row", ["hsdp", "fsdp_tensor"])
def test_the_sums_over_a_matrix_do_not_count_its_replicas(world, row: str) -> None:
    expected = train("alone")
    for result in world(4).run(train, row):
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-4, atol=2e-5)
