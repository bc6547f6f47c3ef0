"""A rule that is registered in one file trains, in every layout, and is saved and resharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muonscale import Muon
from tests.distributed.layouts import SHAPES, gathered, make, mesh_of, placed, rows, whole
from tests.distributed.made_up_rule import reference, tilt_rule

STEPS = 3


def on_tilt(place: Any, **options: Any) -> tuple[dict[str, Any], Muon]:
    """Return parameters and optimizer of the layout tests, with the matrices on the new rule."""
    parameters, muon = make(place)
    groups = [
        {key: group[key] for key in ("params", "param_names", "matrices")} | {"rule": rule}
        for group, rule in zip(muon.param_groups, ("tilt", "adamw"), strict=True)
    ]
    return parameters, Muon(groups, lr=0.1, weight_decay=0.1, tilt=0.8, **options)


def step(parameters: dict[str, Any], optimizer: Muon, place: Any, seeds: range) -> None:
    for seed in seeds:
        for name, parameter in parameters.items():
            parameter.grad = place(name, whole(name, seed))
        optimizer.step()


def stay(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def train(row_name: str, saved: str | None = None, resume: str | None = None) -> dict[str, Any]:
    """Train with a layout, "replicated" or "alone"; save the whole state, or go on from one."""
    place, group = stay, None
    if row_name == "replicated":
        group = dist.group.WORLD
    elif row_name != "alone":
        row = next(row for row in rows(dist.get_world_size()) if row.name == row_name)
        place = placed(row, mesh_of(row))
    with tilt_rule():
        parameters, optimizer = on_tilt(place, process_group=group)
        if resume is not None:
            optimizer.load_state_dict(torch.load(resume))
        step(parameters, optimizer, place, range(1, STEPS + 1))
        state = optimizer.full_state_dict()
        if saved is not None and (row_name == "alone" or dist.get_rank() == 0):
            torch.save(state, saved)
        tensors = {
            f"{number} {key}": value
            for number, values in state["state"].items()
            for key, value in values.items()
        }
    return gathered(parameters) | tensors


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    path = tmp_path_factory.mktemp("tilt") / "state.pt"
    return train("alone", saved=str(path)), path


def test_one_process_does_what_the_rule_says(alone) -> None:
    gradients = [whole("plain", seed) for seed in range(1, STEPS + 1)]
    expected = reference(whole("plain", 0), gradients, lr=0.1, weight_decay=0.1, tilt=0.8)
    torch.testing.assert_close(alone[0]["plain"].double(), expected, rtol=1e-5, atol=1e-6)
    keys = {key.split()[1] for key in alone[0] if key.split()[0] == "0" and " " in key}
    assert keys == {"mean", "square", "row_length"}


FAST = {(2, "tensor"), (2, "replicated"), (3, "columns"), (3, "replicated"), (4, "fsdp_tensor")}
"""Every row of the table; the slow tests have all numbers of processes."""


@pytest.mark.parametrize(
    ("size", "row"),
    [
        pytest.param(size, row, marks=() if (size, row) in FAST else pytest.mark.slow)
        for size in (2, 3, 4)
        for row in [*(row.name for row in rows(size)), "replicated"]
    ],
)
def test_every_layout_does_what_one_process_does(world, alone, size: int, row: str) -> None:
    for found in world(size).run(train, row):
        assert found.keys() == alone[0].keys() >= SHAPES.keys()
        for name, tensor in alone[0].items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("row", [pytest.param("fsdp", marks=pytest.mark.slow), "replicated"])
def test_a_checkpoint_goes_on_in_another_layout(world, alone, tmp_path: Path, row: str) -> None:
    expected = train("alone", resume=str(alone[1]))
    assert not torch.equal(expected["0 mean"], alone[0]["0 mean"])
    saved = str(tmp_path / "state.pt")
    world(3).run(train, row, saved)
    for found in world(2).run(train, "tensor", None, saved):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=5e-5)
