from __future__ import annotations

import json
import math
import random
from dataclasses import asdict

import pytest

from muonscale.lab.training.spikes import FACTOR, LEAST, WINDOW, Spikes, is_spike


def test_a_spike_is_above_three_medians() -> None:
    before = [1.0, 2.0, 3.0] * 10
    assert not is_spike(6.0, before)
    assert is_spike(6.01, before)
    assert is_spike(6.01, [*before, 1e9, 1e9, -1.0, -1.0])  # a few others do not matter


def test_the_first_steps_are_none() -> None:
    assert not is_spike(100.0, [1.0] * (LEAST - 1))
    assert is_spike(100.0, [1.0] * LEAST)
    assert is_spike(math.nan, []) and is_spike(math.inf, [])


def test_a_rule_without_updates_has_no_spikes() -> None:
    assert not is_spike(0.0, [0.0] * 50)


def by_hand(values: list[float]) -> int:
    count = 0
    for i, value in enumerate(values):
        before = sorted([v for v in values[:i] if math.isfinite(v)][-WINDOW:])
        if not math.isfinite(value):
            count += 1
        elif len(before) >= LEAST:
            middle = len(before) // 2
            odd = len(before) % 2
            median = before[middle] if odd else (before[middle - 1] + before[middle]) / 2
            count += value > FACTOR * median
    return count


@pytest.fixture
def values() -> list[float]:
    draw = random.Random(0)
    found = [draw.lognormvariate(0, 0.7) * (1 + i / 50) for i in range(400)]
    found[200], found[300] = math.inf, math.nan
    return found


def test_counts_are_those_of_a_plain_loop(values: list[float]) -> None:
    spikes = Spikes()
    for value in values:
        counts = spikes.add({"grad_norm": value, "update_rms": 0.2})
    assert counts == {"grad_norm": by_hand(values), "update_rms": 0}
    assert by_hand(values) > 5
    assert len(spikes.last["grad_norm"]) == WINDOW


@pytest.mark.parametrize("at", [0, 10, 150, 250])
def test_a_count_that_is_taken_up_again_continues_the_same(values: list[float], at: int) -> None:
    first = Spikes()
    for value in values[:at]:
        first.add({"grad_norm": value})
    second = Spikes(**json.loads(json.dumps(asdict(first))))
    assert second == first
    for value in values[at:]:
        counts = second.add({"grad_norm": value})
    assert counts == {"grad_norm": by_hand(values)}
