from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from muonscale.errors import StudyError
from muonscale.lab.fits.statistics import adjust_holm
from muonscale.lab.studies.analysis.seed_blocks import fit_blocks, mean_interval


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_two_groups_are_a_paired_t_test() -> None:
    one, other = [3.1, 3.4, 3.2, 3.6], [3.3, 3.5, 3.5, 3.7]
    found = fit_blocks({"a": by_seed(one), "b": by_seed(other)}).difference("a", "b")
    oracle = stats.ttest_rel(one, other, alternative="less")
    low, high = stats.ttest_rel(one, other).confidence_interval(0.9)
    assert found.p == pytest.approx(oracle.pvalue)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.freedom == 3


def test_a_lucky_seed_is_taken_out() -> None:
    # Seeds differ by whole nats, groups by a tenth and no more: no noise is left.
    losses = {g: {s: 3 + s + shift for s in range(3)} for g, shift in (("a", 0.0), ("b", 0.1))}
    found = fit_blocks(losses).difference("a", "b")
    assert (found.estimate, found.low, found.high) == pytest.approx((-0.1, -0.1, -0.1), abs=1e-9)


def test_many_groups_share_one_noise() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5, 3))
    blocks = fit_blocks({g: by_seed(list(row)) for g, row in enumerate(table)})
    # The residual of a two-way table: value - row mean - column mean + mean.
    left = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    assert blocks.freedom == (5 - 1) * (3 - 1)
    assert blocks.sigma == pytest.approx(math.sqrt((left**2).sum() / blocks.freedom))
    found = blocks.difference(1, 4)
    half = stats.t.ppf(0.95, 8) * blocks.sigma * math.sqrt(2 / 3)
    assert found.estimate == pytest.approx(table[1].mean() - table[4].mean())
    assert found.high - found.estimate == pytest.approx(half)


def test_a_missing_run_is_bridged_by_the_other_seeds() -> None:
    # b lacks the bad seed 1: plain means would make it look better than it is.
    losses = {"a": {0: 3.0, 1: 4.0}, "b": {0: 3.2}, "c": {0: 3.1, 1: 4.1}}
    found = fit_blocks(losses).difference("b", "a")
    assert found.estimate == pytest.approx(0.2)


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        table = (
            rng.normal(size=(4, 2)) * 0.01 + rng.normal(size=2) * 0.2 + np.arange(4)[:, None] * 0.01
        )
        found = fit_blocks({g: by_seed(list(row)) for g, row in enumerate(table)}).difference(3, 1)
        hits += found.low <= 0.02 <= found.high
    assert 0.86 <= hits / 400 <= 0.94


def test_one_seed_has_no_interval() -> None:
    found = fit_blocks({"a": {0: 1.0}, "b": {0: 2.0}}).difference("a", "b")
    assert found.estimate == -1.0
    assert math.isnan(found.low)
    assert math.isnan(found.p)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({}, "0 groups"),
        ({"a": {}}, "1 groups"),
        ({"a": {0: 1.0}, "b": {1: 1.0}}, "none"),
    ],
)
def test_what_cannot_be_compared_is_refused(losses: dict[str, dict[int, float]], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        fit_blocks(losses)


def test_the_interval_of_one_mean_holds_the_luck_of_the_seed() -> None:
    mean, low, high = mean_interval([[1.0, 3.0], [5.0, 5.0]], 0)
    # Pooled variance (2 + 0) / 2 = 1 with two degrees of freedom; two seeds.
    half = stats.t.ppf(0.95, 2) * math.sqrt(1 / 2)
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))


def test_holm_multiplies_by_what_is_left() -> None:
    assert adjust_holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx(
        [0.03, 0.06, 0.06, math.nan], nan_ok=True
    )
    assert adjust_holm([0.9, 0.8]) == [1.0, 1.0]
