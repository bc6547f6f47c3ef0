from __future__ import annotations

import math

import pytest
import torch

from muonscale.errors import ConfigError
from muonscale.lab.config import ScheduleSection
from muonscale.lab.training.schedule import (
    apply_multiplier,
    check_schedule,
    multiplier,
)


def values(steps: int, **fields: object) -> list[float]:
    schedule = ScheduleSection.model_validate(fields)
    return [multiplier(schedule, step, steps) for step in range(steps)]


def test_cosine_equals_its_formula() -> None:
    got = values(100, name="cosine", warmup=10, final=0.1)
    assert got[:10] == [(i + 1) / 11 for i in range(10)]
    want = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 90)) for i in range(90)]
    assert got[10:] == pytest.approx(want, rel=1e-12)


def test_linear_without_warmup_starts_at_one_and_heads_for_the_final_value() -> None:
    assert values(4, name="linear", warmup=0, final=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_wsd_warms_up_holds_and_decays() -> None:
    got = values(20, name="wsd", warmup=2, decay=5, final=0)
    assert got == pytest.approx([1 / 3, 2 / 3] + [1.0] * 13 + [1.0, 0.8, 0.6, 0.4, 0.2])


def test_constant_linear_is_muon_plus_schedule() -> None:
    got = values(10, name="constant-linear", warmup=0, decay=0.6, final=0.1)
    assert got == pytest.approx([1.0] * 4 + [1.0 - 0.9 * i / 6 for i in range(6)])


def test_a_length_below_one_is_a_fraction_of_the_run() -> None:
    assert values(50, name="cosine", warmup=0.1) == values(50, name="cosine", warmup=5)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant-linear"])
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_no_step_is_wasted_at_zero(name: str, steps: int) -> None:
    got = values(steps, name=name, warmup=0.2, decay=0.5, final=0.0)
    assert all(0 < value <= 1 for value in got)


def test_parts_longer_than_the_run_are_refused() -> None:
    for fields in ({"warmup": 10}, {"name": "wsd", "warmup": 6, "decay": 6}):
        with pytest.raises(ConfigError, match="10 steps"):
            check_schedule(ScheduleSection.model_validate(fields), 10)


def test_group_ratios_hold_at_every_step() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [
        {"params": [p], "lr": lr, "peak_lr": lr}
        for p, lr in zip(parameters, (1.0, 0.25), strict=True)
    ]
    optimizer = torch.optim.SGD(groups)
    for value in (0.5, 0.1, 1.0):
        apply_multiplier(optimizer, value)
        assert [g["lr"] for g in optimizer.param_groups] == [value, 0.25 * value]
