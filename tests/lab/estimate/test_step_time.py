from __future__ import annotations

from dataclasses import replace

import pytest

from muonscale.lab.devices import find_device
from muonscale.lab.estimate.step_time import RankWork, break_even, slower_than, step_time
from muonscale.lab.estimate.traffic import Message

DEVICE = replace(
    find_device("h100"),
    flops={"bfloat16": 1e12, "float32": 1e11},
    memory_bandwidth=1e9,
    intra=1e9,
    inter=1e8,
)
WORK = RankWork(
    flops=4e11,
    precision="bfloat16",
    checkpointing=False,
    ns_flops=10**11,
    products="bfloat16",
    rounds=4,
    touched=0,
)


def message(purpose: str, nbytes: int, ranks: int = 8, kind: str = "all_gather") -> Message:
    return Message(
        purpose=purpose,  # type: ignore[arg-type]
        kind=kind,  # type: ignore[arg-type]
        sent=nbytes,
        received=0,
        ranks=ranks,
        stride=1,
    )


def test_passes_go_at_the_stated_part_of_the_peak() -> None:
    assert step_time(WORK, [], DEVICE, 0.4).passes == pytest.approx(1.0)
    again = replace(WORK, checkpointing=True)
    assert step_time(again, [], DEVICE, 0.4).passes == pytest.approx(4 / 3)
    # half of the peak, see NS_MFU
    assert step_time(WORK, [], DEVICE, 0.4).newton_schulz == pytest.approx(0.2)


def test_gradients_are_hidden_as_far_as_the_passes_last() -> None:
    found = step_time(WORK, [message("gradients", 4 * 10**8)], DEVICE, 0.4)
    assert (found.hidden, found.exposed) == (pytest.approx(0.4), 0)
    found = step_time(WORK, [message("gradients", 3 * 10**9)], DEVICE, 0.4)
    assert (found.hidden, found.exposed) == (pytest.approx(1.0), pytest.approx(2.0))


def test_activations_are_waited_for_and_machines_are_slower() -> None:
    found = step_time(WORK, [message("tensor", 10**8)], DEVICE, 0.4)
    assert found.activations == pytest.approx(0.1)
    found = step_time(WORK, [message("experts", 10**8, ranks=16)], DEVICE, 0.4)
    assert found.activations == pytest.approx(1.0)


def test_the_exchange_is_hidden_but_for_a_round() -> None:
    small = step_time(WORK, [message("matrices", 10**8)], DEVICE, 0.4)
    assert small.newton_schulz + small.exchange == pytest.approx(0.2 + 0.1 / 4)
    large = step_time(WORK, [message("matrices", 10**9)], DEVICE, 0.4)
    assert large.newton_schulz + large.exchange == pytest.approx(1.0 + 0.2 / 4)
    team = step_time(WORK, [message("matrices", 10**8, kind="subgroup")], DEVICE, 0.4)
    assert team.exchange == pytest.approx(0.1)


def test_moments_go_at_the_bandwidth_of_the_memory() -> None:
    work = replace(WORK, touched=15 * 10**6)
    assert step_time(work, [], DEVICE, 0.4).elementwise == pytest.approx(4 * 15e6 / 1e9)


def test_the_total_is_the_sum_of_what_is_on_the_clock() -> None:
    found = step_time(WORK, [message("gradients", 10**8), message("tensor", 10**8)], DEVICE, 0.4)
    assert found.total == pytest.approx(1.0 + 0.1 + 0.2)


def test_a_step_a_quarter_longer_needs_a_fifth_fewer_steps() -> None:
    assert slower_than(1.25, 1.0) == pytest.approx(0.25)
    assert break_even(1.25, 1.0) == pytest.approx(0.2)
