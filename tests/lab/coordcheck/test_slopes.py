"""Slopes against scipy's, and how often their intervals hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from muonscale.lab.coordcheck.slopes import fit_slope

WIDTHS = (32, 64, 128, 256)


def test_a_power_law_is_found_whatever_the_seeds_begin_with() -> None:
    starts = np.array([[1.0], [7.0], [0.02]])
    slope = fit_slope(WIDTHS, starts * np.array(WIDTHS) ** -0.5)
    assert (slope.value, slope.low, slope.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_of_one_seed_it_is_the_ordinary_regression() -> None:
    values = np.array([[1.0, 1.3, 1.1, 1.9]])
    found = fit_slope(WIDTHS, values, confidence=0.8)
    expected = stats.linregress(np.log(WIDTHS), np.log(values[0]))
    half = stats.t.ppf(0.9, 2) * expected.stderr
    assert found.value == pytest.approx(expected.slope)
    assert (found.low, found.high) == pytest.approx((expected.slope - half, expected.slope + half))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    widths, held, trials = np.array(WIDTHS), 0, 2000
    for _ in range(trials):
        seeds = generator.normal(0, 1, (3, 1))  # alike at all widths
        noise = generator.normal(0, 0.1, (3, 4))
        slope = fit_slope(WIDTHS, np.exp(seeds + noise) * widths**0.3)
        held += slope.low <= 0.3 <= slope.high
    assert held / trials == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_number_that_has_no_logarithm_leaves_no_slope(bad: float) -> None:
    values = np.ones((2, 4))
    values[1, 2] = bad
    assert not fit_slope(WIDTHS, values).known
