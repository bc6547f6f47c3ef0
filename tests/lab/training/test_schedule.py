from __future__ import annotations

import math

import pytest
import torch

from muonscale.errors import ConfigError
from muonscale.lab.config.load import load_config
from muonscale.lab.config.run_length import Timeline
from muonscale.lab.config.sections import ScheduleSection
from muonscale.lab.training.schedule import (
    apply_multiplier,
    check_schedule,
    multiplier,
)


def values(steps: int, **fields: object) -> list[float]:
    schedule = ScheduleSection.model_validate(fields)
    return [multiplier(schedule, step, Timeline.constant(steps)) for step in range(steps)]


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
    for words in (["warmup=10"], ["name=wsd", "warmup=6", "decay=6"]):
        config = load_config("demo", ["train.steps=10", *(f"schedule.{word}" for word in words)])
        with pytest.raises(ConfigError, match="10 steps"):
            check_schedule(config)


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


MOONLIGHT = [
    {"name": "constant", "until": 200, "warmup": 10},
    {"name": "cosine", "until": 0.8, "final": 0.1},
    {"name": "linear", "warmup": 4, "peak": 0.25, "final": 0},
]


def stages(timeline: Timeline, items: list[dict[str, object]] = MOONLIGHT) -> list[float]:
    schedule = ScheduleSection.model_validate({"name": "stages", "stages": items})
    return [multiplier(schedule, step, timeline) for step in range(timeline.steps)]


def test_stages_take_up_where_the_one_before_ended() -> None:
    got = stages(Timeline.constant(100, batch=2, length=10))  # 10, 70 and 20 steps
    assert got[:10] == [(i + 1) / 11 for i in range(10)]
    want = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 70)) for i in range(70)]
    assert got[10:80] == pytest.approx(want, rel=1e-12)
    assert got[80:84] == pytest.approx([0.1 + 0.15 * (i + 1) / 5 for i in range(4)])
    assert got[84:] == pytest.approx([0.25 * (1 - i / 16) for i in range(16)])


def test_where_the_batch_grows_a_stage_falls_by_tokens() -> None:
    timeline = Timeline.changing(2000, 2, [(800, 4)], length=10)
    got = stages(timeline)
    for step, value in enumerate(got):
        tokens = timeline.tokens_before(step)
        if 200 <= tokens < 1600:
            want = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (tokens - 200) / 1400))
            assert value == pytest.approx(want, rel=1e-12), step
    assert timeline.steps == 70 and len(got) == 70


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["name=stages"], "schedule.name=stages with 0 items"),
        (["stages=[{name: linear}]"], "schedule.name=cosine with 1 items"),
        (["name=stages", "stages=[{name: linear},{name: linear}]"], "None, None"),
        (["name=stages", "stages=[{name: linear, until: 0.5}]"], "end at 0.5"),
        (
            ["name=stages", "stages=[{name: linear, until: 0.5},{name: linear, until: 0.4},"
             "{name: linear}]"],
            "end at steps 5, 4, 10 of 10",
        ),
        (["name=stages", "stages=[{name: linear, shape: 1}]"], "unknown key schedule.stages.0.shape"),
        (
            ["name=stages", "stages=[{name: linear, weights: {a: 1}}]"],
            "schedule.stages.0.weights is given, and there is no data.mixture",
        ),
    ],
)  # fmt: skip
def test_stages_that_do_not_fit_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("demo", ["train.steps=10", *(f"schedule.{word}" for word in words)])


def test_a_stage_of_warm_up_alone_must_hold() -> None:
    words = ["train.steps=10", "schedule.name=stages"]
    item = "schedule.stages=[{name: NAME, until: 0.5, warmup: 5}, {name: linear}]"
    check_schedule(load_config("demo", [*words, item.replace("NAME", "constant")]))
    for name, found in (("cosine", "stages.0.warmup=5 is 5 steps"), ("wsd", "stages.0.decay=0.2")):
        with pytest.raises(ConfigError, match=found):
            check_schedule(load_config("demo", [*words, item.replace("NAME", name)]))
