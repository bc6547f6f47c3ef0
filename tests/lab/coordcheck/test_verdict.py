"""What becomes of slopes: limits and verdicts on numbers made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from muonscale.lab.coordcheck.slopes import UNKNOWN, Slope
from muonscale.lab.coordcheck.text import cells
from muonscale.lab.coordcheck.tolerances import Limit, limit_of
from muonscale.lab.coordcheck.verdict import judge, judged_steps, passed, worst_of

FLAT, FALLS, ROOT = Limit(), Limit(lowest=-0.5), Limit(lowest=-0.5, highest=-0.5)


@pytest.mark.parametrize(
    ("limit", "slope", "outcome"),
    [
        (FLAT, Slope(0.05, 0.01, 0.09), "pass"),
        (FLAT, Slope(-0.09, -0.2, 0.02), "pass"),
        (FLAT, Slope(0.05, -0.2, 0.3), "undecided"),  # its interval reaches too far
        (FLAT, Slope(0.15, 0.05, 0.25), "undecided"),  # some of it is flat
        (FLAT, Slope(0.15, 0.11, 0.19), "fail"),
        (FLAT, Slope(-0.15, -0.19, -0.11), "fail"),
        (FLAT, Slope(0.5, -0.2, 1.2), "fail"),  # however wide
        (FLAT, UNKNOWN, "fail"),
        (ROOT, Slope(-0.45, -0.5, -0.4), "pass"),
        (ROOT, Slope(0.0, -0.02, 0.02), "fail"),
        (FALLS, Slope(-0.5, -0.6, -0.4), "pass"),
        (FALLS, Slope(-0.25, -0.3, -0.2), "pass"),
        (FALLS, Slope(-0.5, -1.6, 0.6), "undecided"),
        (FALLS, Slope(-0.9, -1.0, -0.8), "fail"),
        (FALLS, Slope(0.15, 0.11, 0.19), "fail"),
    ],
)
def test_a_slope_is_flat_is_not_or_is_not_decided(limit: Limit, slope: Slope, outcome: str) -> None:
    assert limit.judge(slope) == outcome


def test_limits_are_by_quantity_part_and_rule() -> None:
    assert limit_of("change", "attention", "muon") == FLAT
    assert limit_of("change", "feed-forward", "muon") == Limit(tolerance=0.2)
    assert limit_of("update", "attention", "muon", fall=0.1) == FLAT
    assert limit_of("update", "attention", "adamw") == FALLS
    assert limit_of("update", "gains and biases", "adamw") == FLAT


def test_outputs_of_a_matrix_that_grows_less_than_its_inputs_may_fall() -> None:
    assert limit_of("start", "router", "muon", fall=0.5) == ROOT
    for quantity in ("size", "change", "weight"):
        assert limit_of(quantity, "router", "muon", fall=0.5) == FALLS
    assert limit_of("change", "logits", "adamw", fall=0.5) == FLAT
    assert limit_of("size", "logits", "adamw", fall=0.5) == FALLS


def test_scores_of_longer_heads_begin_smaller() -> None:
    assert limit_of("start", "attention logits", None) == FLAT
    assert limit_of("start", "attention logits", None, grow="head_dim") == ROOT
    assert limit_of("change", "attention logits", None, grow="head_dim").lowest == -0.5


def test_the_later_steps_are_the_second_half_and_none_of_the_first_two() -> None:
    assert list(judged_steps(6)) == [3, 4, 5, 6]
    assert list(judged_steps(3)) == [2, 3]


def table(exponent: float, noise: float = 0.0, steps: int = 4) -> np.ndarray:
    """Return `[3, 3, steps + 1]` values that follow a power of the widths from step 2 on."""
    generator = np.random.default_rng(0)
    widths = np.array([16.0, 32.0, 64.0])[None, :, None]
    values = np.repeat(np.repeat(widths**exponent, 3, 0), steps + 1, 2)
    values[:, :, :2] = 1.0
    return values * np.exp(generator.normal(0, noise, (3, 3, 1)))


def outcomes(values: np.ndarray, quantity: str = "change", part: str = "attention") -> list[str]:
    rows = judge((16, 32, 64), {(quantity, part, "a"): values}, {}, {})
    return [row.outcome for row in rows]


def test_what_grows_fails_and_what_is_flat_passes() -> None:
    assert outcomes(table(0.0)) == ["pass"]
    assert outcomes(table(0.5)) == outcomes(table(-0.5)) == ["fail"]


def test_noise_is_no_pass() -> None:
    assert outcomes(table(0.0, noise=0.02)) == ["pass"]
    assert outcomes(table(0.0, noise=0.4)) != ["pass"]


def test_a_zero_and_a_run_that_diverged_fail() -> None:
    for bad in (0.0, math.nan, math.inf):
        values = table(0.0)
        values[1, 1, 3] = bad
        assert outcomes(values) == ["fail"]


def test_sizes_are_judged_before_training_too() -> None:
    values = table(0.0)
    values[:, :, 0] *= np.array([1.0, 2.0, 4.0])
    rows = judge((16, 32, 64), {("size", "attention", "a"): values}, {}, {})
    assert [(row.quantity, row.outcome) for row in rows] == [("start", "fail"), ("size", "pass")]
    falls = {("size", "router", "a"): 1 / np.sqrt(values)}
    rows = judge((16, 32, 64), falls, {}, {"a": 0.5})
    assert [row.outcome for row in rows] == ["pass", "pass"]


def test_the_worst_row_decides_and_one_that_is_undecided_is_no_pass() -> None:
    values = {
        ("change", "attention", "flat"): table(0.0),
        ("change", "attention", "grows"): table(0.5),
        ("update", "attention", "w"): table(0.05),
    }
    rows = judge((16, 32, 64), values, {"w": "muon"}, {})
    assert worst_of(rows).name == "grows" and not passed(rows)
    assert passed([row for row in rows if row.name != "grows"])


def test_the_rule_of_a_part_of_a_fused_parameter_is_that_of_the_parameter() -> None:
    falls = {("update", "attention", "w[2]"): table(-0.5)}
    assert [row.outcome for row in judge((16, 32, 64), falls, {"w": "adamw"}, {})] == ["pass"]
    assert [row.outcome for row in judge((16, 32, 64), falls, {"w": "muon"}, {})] == ["fail"]


def test_a_limit_of_minus_zero_is_zero_in_the_table() -> None:
    row = {
        "part": "p",
        "quantity": "size",
        "name": "n",
        "slope": 0.0,
        "low": -0.1,
        "high": 0.1,
        "lowest": -0.0,
        "highest": 0.0,
        "tolerance": 0.1,
        "outcome": "pass",
    }
    assert cells(row)[4] == "0 +- 0.1"
