"""The path of a GPU, where the host learns of a bad step only when the next one begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.optim.distributed import context
from muonscale.optim.distributed.zero1 import gather
from muonscale.optim.rules.nonfinite import FiniteCheck
from tests.distributed.layouts import SHAPES, gathered, make, mesh_of, placed, rows, whole

BAD = 2
"""The step that is left out."""


def train(row_name: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return parameters and state after 3 steps, of which the second meets a NaN."""
    group = dist.group.WORLD if row_name == "replicated" else None

    def place(name: str, tensor: Tensor) -> Tensor:
        return tensor

    if group is None:
        row = next(row for row in rows(dist.get_world_size()) if row.name == row_name)
        place = placed(row, mesh_of(row))
    parameters, optimizer = make(place, process_group=group, nonfinite="skip", **options)
    agreed = context.DistributedContext.check_finite

    def late(self: Any, items: Any) -> FiniteCheck:
        found = agreed(self, items)
        found.mask = (found.at_fault == 0).all()
        return found

    context.DistributedContext.check_finite = late  # type: ignore[method-assign]
    try:
        for seed in (1, BAD, 3):
            for name, parameter in parameters.items():
                gradient = whole(name, seed)
                if seed == BAD and name == "plain":
                    gradient[0, 0] = float("nan")
                parameter.grad = place(name, gradient)
            optimizer.step()
    finally:
        context.DistributedContext.check_finite = agreed  # type: ignore[method-assign]
    optimizer.check_finite()
    assert optimizer.stats()["skipped_steps"] == 1
    state = {
        f"{key}.{name}": gather(value, group)
        for name in SHAPES
        for key, value in optimizer.state[parameters[name]].items()
    }
    return gathered(parameters), state


def expected(options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the same of one process without the bad step."""
    parameters, optimizer = make(lambda _, tensor: tensor, **options)
    for seed in (1, 3):
        for name, parameter in parameters.items():
            parameter.grad = whole(name, seed)
        optimizer.step()
    state = {
        f"{key}.{name}": value
        for name in SHAPES
        for key, value in optimizer.state[parameters[name]].items()
    }
    return {name: parameter.detach() for name, parameter in parameters.items()}, state


MANY = {"post_norm": "normuon", "second_moment": "update", "row_fraction": 0.5}


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ("fsdp", {**MANY, "constraint": "weight_norm"}),
        ("replicated", {**MANY, "constraint": "weight_norm"}),
        ("columns", {**MANY, "constraint": "row_magnitude"}),
        ("columns", {"constraint": "row_magnitude", "cautious_decay": True}),
        ("fsdp", {"second_moment": "gradient", "cautious_decay": True}),
    ],
)
def test_a_step_that_is_left_out_leaves_all_state_as_it_was(world, row, options) -> None:
    parameters, state = expected(options)
    for found, held in world(2).run(train, row, options):
        for name, tensor in parameters.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5)
        assert held.keys() == state.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(held[name], tensor, rtol=1e-4, atol=2e-5)
