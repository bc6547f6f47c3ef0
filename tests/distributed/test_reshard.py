"""State that is saved in one layout and loaded in another."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from muonscale.errors import CheckpointError
from tests.distributed.layouts import gathered, make, mesh_of, placed, reference, rows, whole

OPTIONS = {
    "post_norm": "normuon",
    "second_moment": "update",
    "constraint": "row_magnitude",
    "row_fraction": 0.5,
    "momentum": 0.9,
}
"""Every kind of state."""


def build(row_name: str) -> tuple[dict[str, Any], Any, Any]:
    if row_name == "replicated":
        parameters, optimizer = make(
            lambda _, tensor: tensor, process_group=dist.group.WORLD, **OPTIONS
        )
        return parameters, optimizer, lambda _, tensor: tensor
    row = next(row for row in rows(dist.get_world_size()) if row.name == row_name)
    place = placed(row, mesh_of(row))
    parameters, optimizer = make(place, **OPTIONS)
    return parameters, optimizer, place


def by_name(parameters: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Return what a checkpoint holds: parameters, and state under the parameters' names."""
    held: dict[str, Any] = {f"model.{n}": p.detach() for n, p in parameters.items()}
    for name, parameter in parameters.items():
        held |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    return held


def steps(parameters: dict[str, Any], optimizer: Any, place: Any, first: int) -> None:
    for seed in (first, first + 1):
        for name, parameter in parameters.items():
            parameter.grad = place(name, whole(name, seed))
        optimizer.step()


def save(folder: str, row: str) -> None:
    parameters, optimizer, place = build(row)
    steps(parameters, optimizer, place, 1)
    dcp.save(by_name(parameters, optimizer), checkpoint_id=folder)


def resume(folder: str, row: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    parameters, optimizer, place = build(row)
    dcp.load(by_name(parameters, optimizer), checkpoint_id=folder)
    full = copy.deepcopy(optimizer.full_state_dict())
    steps(parameters, optimizer, place, 3)
    return gathered(parameters), full


@pytest.mark.parametrize(
    "saved",
    [
        "fsdp_tensor",
        "replicated",
        *(pytest.param(row, marks=pytest.mark.slow) for row in ("fsdp", "hsdp", "columns")),
    ],
)
def test_saved_on_four_ranks_it_goes_on_in_any_layout(world, tmp_path: Path, saved: str) -> None:
    world(4).run(save, str(tmp_path), saved)
    expected = reference(4, **OPTIONS)
    parameters, optimizer = make(lambda _, tensor: tensor, **OPTIONS)
    for seed in (1, 2):
        for name, parameter in parameters.items():
            parameter.grad = whole(name, seed)
        optimizer.step()
    state = optimizer.state_dict()["state"]
    for size, row in [(1, "fsdp"), (2, "fsdp"), (3, "columns"), (3, "replicated"), (4, "hsdp")]:
        for result, full in world(size).run(resume, str(tmp_path), row):
            for number, values in state.items():
                for key, value in values.items():
                    torch.testing.assert_close(
                        full["state"][number][key], value, rtol=1e-4, atol=1e-5
                    )
            for name, tensor in expected.items():
                torch.testing.assert_close(result[name], tensor, rtol=1e-4, atol=5e-5)


def exchange_of_state(row: str) -> dict[str, Tensor]:
    """Load what one process has saved, and go on."""
    parameters, optimizer = make(lambda _, tensor: tensor, **OPTIONS)
    steps(parameters, optimizer, lambda _, tensor: tensor, 1)
    theirs, other, place = build(row)
    for name, parameter in theirs.items():
        parameter.data.copy_(place(name, parameters[name].detach()))
    other.load_state_dict(optimizer.state_dict())
    steps(theirs, other, place, 3)
    back = other.full_state_dict()
    optimizer.load_state_dict(back)
    return gathered(theirs)


@pytest.mark.parametrize("row", ["fsdp", "tensor", "replicated"])
def test_the_state_of_one_process_is_taken_over_by_many(world, row: str) -> None:
    expected = reference(4, **OPTIONS)
    for result in world(2).run(exchange_of_state, row):
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-4, atol=5e-5)


def _stager() -> DefaultStager:
    """Return torch's stager as on a machine without a GPU, where pinned memory makes it warn."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )


def save_async(folder: str) -> None:
    parameters, optimizer, place = build("replicated")
    steps(parameters, optimizer, place, 1)
    saving: Any = dcp.async_save(
        by_name(parameters, optimizer),
        checkpoint_id=folder,
        async_stager=_stager(),
        process_group=dist.new_group(),  # not that of the steps, which go on
    )
    steps(parameters, optimizer, place, 3)  # what is saved is a copy
    saving.result()


def test_partitioned_state_is_saved_while_training_goes_on(world, tmp_path: Path) -> None:
    world(3).run(save_async, str(tmp_path))
    parameters, optimizer = make(lambda _, tensor: tensor, **OPTIONS)
    dcp.load(by_name(parameters, optimizer), checkpoint_id=str(tmp_path), no_dist=True)
    before, trained = make(lambda _, tensor: tensor, **OPTIONS)
    steps(before, trained, lambda _, tensor: tensor, 1)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, before[name], rtol=1e-4, atol=2e-5)
        for key, value in optimizer.state[parameter].items():
            expected = trained.state[before[name]][key]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-5)


def staged_parts(_: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return the parts of a state tensor, and those of its copy for another process."""
    parameters, optimizer, place = build("replicated")
    steps(parameters, optimizer, place, 1)
    value = optimizer.state[parameters["experts"]]["momentum_buffer"]
    with pytest.raises(CheckpointError):
        pickle.dumps(value)  # a file of it would lack what the other ranks have
    staged = _stager().stage({"value": value})
    return value.parts, pickle.loads(pickle.dumps(staged["value"])).parts


def test_a_staged_copy_of_partitioned_state_goes_to_another_process(world) -> None:
    results = world(2).run(staged_parts, 0)
    assert sum(len(parts) for parts, _ in results) == 10
    for parts, copied in results:
        assert parts.keys() == copied.keys()
        for number, part in parts.items():
            assert torch.equal(part, copied[number])
