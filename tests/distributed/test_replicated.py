"""Plain parameters that every rank holds, as under DistributedDataParallel."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muonscale.errors import CheckpointError, ConfigError, LayoutError, MuonscaleError
from muonscale.optim.distributed import zero1 as owned
from muonscale.optim.distributed.zero1 import PartitionedTensor
from tests.distributed.layouts import (
    RULES,
    SHAPES,
    SIZES,
    STEPS,
    TOLERANCES,
    VECTORS,
    make,
    reference,
    whole,
)


def train(steps: int, options: dict[str, Any]) -> dict[str, Any]:
    owned.WHOLE_BELOW = 20  # so that the embedding is divided
    parameters, optimizer = make(
        lambda _, tensor: tensor, process_group=dist.group.WORLD, **options
    )
    for seed in range(1, steps + 1):
        for name, parameter in parameters.items():
            parameter.grad = whole(name, seed)
        optimizer.step()
    held = 0
    for values in optimizer.state.values():
        for value in values.values():
            if isinstance(value, PartitionedTensor):
                held += sum(part.numel() for part in value.parts.values())
    return {
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "held": held,
        "stats": {k: float(v) for k, v in optimizer.stats().items() if k != "ns_kernel"},
        "full": {
            number: {k: v.clone() for k, v in values.items()}
            for number, values in optimizer.full_state_dict()["state"].items()
        },
    }


FAST = {(1, "muon"), (2, "muon_plus"), (3, "normuon"), (3, "muown"), (2, "dion2"), (4, "muon")}
"""Every number of processes and every rule; the slow tests have all of both."""


@pytest.mark.parametrize(
    ("size", "rule"),
    [
        pytest.param(size, rule, marks=() if (size, rule) in FAST else pytest.mark.slow)
        for size in SIZES
        for rule in RULES
    ],
)
def test_every_rank_ends_with_the_parameters_of_one_process(world, size, rule) -> None:
    results = world(size).run(train, STEPS, RULES[rule])
    expected = reference(STEPS, **RULES[rule])
    alone = world(1).run(train, STEPS, RULES[rule])[0]["stats"]
    for result in results:
        for name, tensor in result["parameters"].items():
            assert torch.equal(tensor, results[0]["parameters"][name]), name
            torch.testing.assert_close(tensor, expected[name], **TOLERANCES)
        assert result["stats"]["matrices"] == 48  # counted by hand
        assert result["stats"]["update_rms"] == pytest.approx(alone["update_rms"], rel=1e-4)


def test_state_is_held_once_by_all_ranks_together_and_is_that_of_one_process(world) -> None:
    options = {"post_norm": "normuon", "second_moment": "update"}
    results = world(4).run(train, 2, options)
    parameters, optimizer = make(lambda _, tensor: tensor, **options)
    for seed in (1, 2):
        for name, parameter in parameters.items():
            parameter.grad = whole(name, seed)
        optimizer.step()
    single = optimizer.state_dict()["state"]
    numbers = [v.numel() for values in single.values() for v in values.values() if v.ndim]
    assert sum(result["held"] for result in results) == sum(numbers)
    assert max(result["held"] for result in results) < 0.5 * sum(numbers)
    for number, values in single.items():
        for key, value in values.items():
            torch.testing.assert_close(results[1]["full"][number][key], value, rtol=1e-4, atol=1e-5)


def pickled(_: int) -> str:
    _, optimizer = make(lambda _, tensor: tensor, process_group=dist.group.WORLD)
    with pytest.raises(CheckpointError) as error:
        torch.save(optimizer.state_dict(), io.BytesIO())
    return str(error.value)


def test_a_part_of_the_state_is_not_saved_as_if_it_were_all(world) -> None:
    assert "full_state_dict" in world(2).run(pickled, 0)[0]


def some_without(_: int) -> str:
    parameters, optimizer = make(lambda _, tensor: tensor, process_group=dist.group.WORLD)
    for name, parameter in parameters.items():
        parameter.grad = whole(name, 1)
    if dist.get_rank() == 1:
        parameters["tall"].grad = None
    with pytest.raises(LayoutError) as error:
        optimizer.step()
    return str(error.value)


def test_a_gradient_missing_on_one_rank_is_an_error_on_all(world) -> None:
    for text in world(2).run(some_without, 0):
        assert "tall" in text


def nonfinite(_: int) -> tuple[str, bool]:
    parameters, optimizer = make(lambda _, tensor: tensor, process_group=dist.group.WORLD)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.grad = whole(name, 1)
    if dist.get_rank() == 1:
        parameters["tall"].grad[0, 0] = float("nan")
    optimizer.step()
    same = all(torch.equal(before[name], p) for name, p in parameters.items())
    with pytest.raises(MuonscaleError) as error:
        optimizer.step()
    return str(error.value), same


def test_a_nan_on_one_rank_leaves_the_step_out_on_all_and_names_the_rank(world) -> None:
    for text, same in world(3).run(nonfinite, 0):
        assert "tall" in text
        assert "rank 1" in text
        assert same


def unlike(_: int) -> str:
    with pytest.raises(ConfigError) as error:
        options = {"ns_steps": 4 + dist.get_rank()}
        parameters, optimizer = make(
            lambda _, tensor: tensor, process_group=dist.group.WORLD, **options
        )
        for name, parameter in parameters.items():
            parameter.grad = whole(name, 1)
        optimizer.step()
    return str(error.value)


def test_ranks_with_other_options_are_told_so(world) -> None:
    for text in world(2).run(unlike, 0):
        assert "ns_steps" in text
        assert "4 on rank 0 and 5 on rank 1" in text
    assert len(SHAPES) + len(VECTORS) == 19
