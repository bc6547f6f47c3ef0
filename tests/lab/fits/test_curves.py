"""Minima of U-shaped curves, and crossings of a loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muonscale.errors import StudyError
from muonscale.lab.fits.crossing import find_crossing
from muonscale.lab.fits.laws.quadratic import fit_minimum, minimum_interval

RATES = np.geomspace(1e-3, 1e-1, 7)


def valley(x: np.ndarray, at: float = 0.012) -> np.ndarray:
    return 3 + 0.5 * np.log(x / at) ** 2


@pytest.mark.parametrize("around", [1, 2])
def test_a_parabola_is_found_exactly(around: int) -> None:
    found = fit_minimum(RATES, valley(RATES), around)
    assert (found.at, found.value, found.curvature) == pytest.approx((0.012, 3, 1), rel=1e-9)
    assert found.points == 2 * around + 1 and found.sides.holds(found.at)
    assert found.best_measured == pytest.approx(0.01)


def test_order_repeats_and_diverged_runs_far_away_do_not_matter() -> None:
    x = np.concatenate([RATES, RATES, [1.0]])[::-1]
    y = np.concatenate([valley(RATES) + 0.1, valley(RATES) - 0.1, [np.nan]])[::-1]
    assert fit_minimum(x, y, 2).at == pytest.approx(0.012, rel=1e-9)


def test_a_wide_parabola_stops_before_a_diverged_run() -> None:
    y = valley(RATES)
    y[5] = np.inf
    found = fit_minimum(RATES, y, around=3)
    assert found.points == 5 and found.at == pytest.approx(0.012, rel=1e-9)


@given(st.floats(1.1e-3, 0.9e-1))
def test_the_minimum_is_between_the_neighbors_of_the_best(at: float) -> None:
    y = np.abs(np.log(RATES / at)) ** 1.5
    place = int(np.argmin(y))
    if place in (0, len(RATES) - 1):
        with pytest.raises(StudyError, match=f"{RATES[place]:g}"):
            fit_minimum(RATES, y)
        return
    assert RATES[place - 1] < fit_minimum(RATES, y).at < RATES[place + 1]


def test_noise_widens_the_interval_of_a_minimum() -> None:
    small, large = (minimum_interval(RATES, valley(RATES), noise) for noise in (0.003, 0.03))
    assert small.low < 0.012 < small.high and large.low < small.low < small.high < large.high
    # Far more noise than the curve is deep: any of the seven may come out lowest.
    huge = minimum_interval(RATES, valley(RATES), 100.0)
    assert huge.low == RATES[0] and huge.high == RATES[-1]


def test_the_interval_of_a_minimum_holds_it() -> None:
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        y = valley(RATES) + 0.03 * rng.standard_normal(len(RATES))
        found = minimum_interval(RATES, y, 0.03, around=2, resamples=100, seed=seed)
        held += found.low <= 0.012 <= found.high
    assert 0.82 <= held / 100 <= 0.97


TOKENS = np.geomspace(1e6, 1e9, 13)


def test_a_power_curve_is_inverted_exactly() -> None:
    loss = 50 * TOKENS**-0.15
    for tokens in (1.5e6, 3.3e7, 1e9):
        found = find_crossing(50 * tokens**-0.15, TOKENS, loss)
        assert found.censored == "" and found.amount == pytest.approx(tokens, rel=1e-9)


def test_a_curve_with_an_offset_is_inverted_closely() -> None:
    loss = 1.5 + 50 * TOKENS**-0.2
    for tokens in (2e6, 3.3e7, 7e8):
        found = find_crossing(1.5 + 50 * tokens**-0.2, TOKENS, loss)
        assert found.amount == pytest.approx(tokens, rel=2e-3)


def test_a_target_outside_of_the_curve_is_censored() -> None:
    loss = 50 * TOKENS**-0.15
    above, below = (
        find_crossing(0.9 * loss[-1], TOKENS, loss),
        find_crossing(1.1 * loss[0], TOKENS, loss),
    )
    assert (above.censored, above.amount, str(above)) == (">", pytest.approx(1e9), "> 1e+09")
    assert (below.censored, below.amount, str(below)) == ("<", pytest.approx(1e6), "< 1e+06")
    assert find_crossing(loss[0], TOKENS, loss).amount == pytest.approx(1e6)
    assert str(find_crossing(loss[6], TOKENS, loss)) == "3.162e+07"


def test_noise_is_averaged_not_taken_for_progress() -> None:
    """A single low evaluation does not count as reaching the target; the running minimum would."""
    loss = np.full(12, 3.0)
    loss[4] = 2.0
    loss[-2:] = 1.5
    amounts = np.arange(1.0, 13.0)
    assert 10 < find_crossing(2.2, amounts, loss).amount < 11.5
    rng = np.random.default_rng(0)
    dense = np.geomspace(1e6, 1e9, 200)
    found = [
        find_crossing(
            2.5, dense, 50 * dense**-0.15 * np.exp(0.01 * rng.standard_normal(200))
        ).amount
        for _ in range(100)
    ]
    assert np.median(found) == pytest.approx((50 / 2.5) ** (1 / 0.15), rel=0.03)


@given(st.floats(0.6, 1.0), st.floats(0.6, 1.0))
def test_a_lower_target_takes_longer(one: float, other: float) -> None:
    rng = np.random.default_rng(5)
    loss = 50 * TOKENS**-0.15 * np.exp(0.02 * rng.standard_normal(13))
    low, high = sorted([one, other])
    first, second = (find_crossing(part * loss[0], TOKENS, loss).amount for part in (high, low))
    assert first <= second
