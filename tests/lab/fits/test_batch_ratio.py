"""The fits of a batch study: three regimes, token-optimal batches, whether a ratio decreases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import lsq_linear

from muonscale.errors import StudyError
from muonscale.lab.fits.laws.regimes import (
    RegimeLaw,
    log_critical,
    log_ratio,
    log_steps,
    ratio_exponents,
)
from muonscale.lab.fits.result import FitStatus, SizeRange
from muonscale.lab.fits.rising import judge_rising
from muonscale.lab.fits.steps_to_loss import StepsToLoss
from muonscale.lab.fits.token_optimal import draw_token_optimal, find_token_optimal

BATCHES = 1024.0 * 2 ** np.arange(6)
LOG_B = np.log(BATCHES)


def steps_by_hand(least: float, m: float, critical: float, batch: np.ndarray) -> np.ndarray:
    """Appendix F as it is printed, with b2 from continuity."""
    b1 = np.log(least)
    b2 = b1 - (1 + m) * np.log(critical)
    log_s = np.where(batch <= critical, -np.log(batch) + b1, m * np.log(batch) + b2)
    return np.exp(log_s)


@pytest.mark.parametrize("m", [-0.05, -0.4, -0.95])
@pytest.mark.parametrize("critical", [1500.0, 2048.0, 3000.0, 7000.0, 8192.0])
def test_three_regimes_are_found_without_noise(m: float, critical: float) -> None:
    steps = steps_by_hand(2e5, m, critical, BATCHES)
    law = RegimeLaw.fit(BATCHES, steps)
    assert law.theta == pytest.approx([np.log(2e5), m, np.log(critical)], abs=1e-6)
    assert law(BATCHES) == pytest.approx(steps, rel=1e-9)
    assert (law.status, law.remark) == (FitStatus.CONVERGED, "")
    assert law.critical.value == pytest.approx(critical) and not law.critical.extrapolated


def test_the_search_finds_the_least_squares() -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        log_tokens = np.cumsum(rng.normal(0.2, 0.3, 6))
        law = RegimeLaw.fit(BATCHES, np.exp(log_tokens) / BATCHES)
        found = np.sum((log_tokens - LOG_B - log_steps(law.theta, LOG_B)) ** 2)
        grid = [
            lsq_linear(
                np.stack([np.ones(6), np.maximum(0, LOG_B - place)], axis=1),
                log_tokens,
                ([-np.inf, 0], [np.inf, 1]),
            ).cost
            for place in np.linspace(LOG_B[0], LOG_B[-1], 60, endpoint=False)
        ]
        assert found <= 2 * min(grid) + 1e-9


@pytest.mark.parametrize(
    ("tokens", "said", "end"),
    [
        ([5, 5, 5, 5, 5, 5], "B* is above", np.inf),
        ([1, 2**0.5, 2, 2**1.5, 4, 2**2.5], "B* is below", -np.inf),
        ([1, 1, 1, 1, 1, 1.4], "one batch size", None),
        ([1, 1, 1, 2, 4, 8], "m is", None),
    ],
)
def test_undetermined_parameters_get_a_remark(
    tokens: list[float], said: str, end: float | None
) -> None:
    law = RegimeLaw.fit(BATCHES, 1e5 * np.array(tokens) / BATCHES)
    assert law.status is FitStatus.BOUND_HIT
    assert said in law.remark
    assert law.critical.extrapolated == (end is not None)
    if end is not None:
        assert log_critical(law.theta, law.ranges[0]) == end


def test_intervals_of_three_regimes_hold_the_truth() -> None:
    """Of 300 tables 90 % +- 1.7 % (a standard error) should."""
    truth = np.array([np.log(2e5), -0.4, np.log(5000.0)])
    log_s = np.log(steps_by_hand(2e5, -0.4, 5000, BATCHES))
    held, span = np.zeros(3), SizeRange(BATCHES[0], BATCHES[-1])
    for seed in range(300):
        noise = 0.05 * np.random.default_rng((1, seed)).standard_normal(6)
        steps = np.exp(log_s + noise)
        law = RegimeLaw.fit(BATCHES, steps)
        draws = law.draw(200, seed, noise=0.05)
        ends = [draws.parameter(0), draws.parameter(1)]
        ends.append(draws.interval(lambda theta: log_critical(theta, span)))
        held += [end.low <= value <= end.high for end, value in zip(ends, truth, strict=True)]
    assert np.all(held / 300 > 0.84) and np.all(held / 300 < 0.97)


def test_residuals_give_intervals_from_five_points() -> None:
    wide = 512.0 * 2 ** np.arange(8)
    steps = steps_by_hand(2e5, -0.4, 5000, wide) * np.exp(0.02 * np.sin(7 * np.arange(8)))
    found = RegimeLaw.fit(wide, steps).draw().parameter(2)
    assert found.low < np.log(5000) < found.high < found.low + 1
    with pytest.raises(StudyError, match="got 4"):
        RegimeLaw.fit(wide[:4], steps[:4]).draw()
    with pytest.raises(StudyError, match="got 3"):
        RegimeLaw.fit(wide[:3], steps[:3])


def test_two_laws_predict_a_ratio_in_three_regimes() -> None:
    adamw, muon = (np.log(3e5), -0.3, np.log(2000.0)), (np.log(2e5), -0.5, np.log(9000.0))
    both = np.array([*adamw, *muon])
    first = steps_by_hand(3e5, -0.3, 2000, BATCHES)
    second = steps_by_hand(2e5, -0.5, 9000, BATCHES)
    assert log_ratio(both, LOG_B) == pytest.approx(np.log(first / second))
    # e^(b1A - b1M), then B^(mA + 1), then B^(mA - mM), as in appendix F.
    assert ratio_exponents(both) == pytest.approx([0, 0.7, 0.2])
    between = np.diff(log_ratio(both, LOG_B))[1:3] / np.log(2)
    assert between == pytest.approx(0.7)
    assert np.diff(log_ratio(both, LOG_B))[-1] / np.log(2) == pytest.approx(0.2)
    swapped = np.array([*muon, *adamw])
    assert ratio_exponents(swapped) == pytest.approx([0, -0.7, -0.2])
    slope = np.diff(log_ratio(swapped, LOG_B))[1:3] / np.log(2)
    assert slope == pytest.approx(-0.7)


def test_the_token_optimal_batch_is_the_largest_with_the_fewest_tokens() -> None:
    tokens = np.log([[3.0, 2, 2, 4], [1, 2, 3, np.inf], [np.inf] * 4])
    found = find_token_optimal(BATCHES[:4], tokens)
    assert found[:2].tolist() == [4096, 1024] and np.isnan(found[2])
    assert find_token_optimal(BATCHES[:4], tokens[1], 0.999) == 1024
    assert find_token_optimal(BATCHES[:4], tokens[1], 1.0) == 2048
    with pytest.raises(StudyError, match="tolerance=-1"):
        find_token_optimal(BATCHES[:4], tokens, -1)


def measured(log_tokens: np.ndarray, error: float, freedom: int = 10) -> StepsToLoss:
    return StepsToLoss(
        batches=BATCHES,
        log_steps=log_tokens - LOG_B,
        error=np.full(6, error),
        freedom=freedom,
    )


def test_its_interval_is_how_often_each_batch_has_the_fewest() -> None:
    log_tokens = np.array([0.02, 0.0, 0.01, 0.5, 1.0, np.inf])
    sharp = draw_token_optimal(measured(log_tokens, 1e-4)).parameter(0)
    assert (sharp.low, sharp.value, sharp.high) == (2048, 2048, 2048)
    blurred = draw_token_optimal(measured(log_tokens, 0.05)).parameter(0)
    assert (blurred.low, blurred.value, blurred.high) == (1024, 2048, 4096)
    with pytest.raises(StudyError, match="two seeds"):
        draw_token_optimal(measured(log_tokens, np.nan, 0))


def covariance(sigma: float) -> np.ndarray:
    return sigma**2 * np.eye(6)


def test_a_slope_is_that_of_a_regression() -> None:
    log_r = np.array([0.1, 0.05, 0.2, 0.3, 0.25, 0.4])
    oracle = stats.linregress(LOG_B, log_r)
    # With the residual variance and its degrees the interval is the regression's own.
    left = log_r - oracle.intercept - oracle.slope * LOG_B
    found = judge_rising(BATCHES, log_r, covariance(np.sqrt(np.sum(left**2) / 4)), 4)
    half = stats.t.ppf(0.95, 4) * oracle.stderr
    assert found.slope.value == pytest.approx(oracle.slope)
    assert found.slope.high - found.slope.value == pytest.approx(half)
    assert found.drop is not None
    assert (found.drop.start, found.drop.end) == (1024, 2048)
    assert found.drop.size == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("log_r", "sigma", "freedom", "verdict"),
    [
        ([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], 0.01, 10, True),
        ([0.0, 0.1, 0.2, 0.3, 0.4, 0.1], 0.01, 10, False),  # it rises, and falls at the end
        ([0.0, 0.1, 0.2, 0.3, 0.4, 0.1], 1.0, 10, None),
        ([0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 0.01, 10, None),
        ([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], np.nan, 0, None),
        ([0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 0.0, 10, True),  # without noise flat is enough
        ([0.2, 0.1, 0.1, 0.1, 0.1, 0.1], 0.0, 10, False),
    ],
)
def test_a_verdict_follows_its_rule(
    log_r: list[float], sigma: float, freedom: int, verdict: bool | None
) -> None:
    found = judge_rising(BATCHES, np.array(log_r), covariance(sigma), freedom)
    assert found.non_decreasing is verdict


def test_a_drop_is_judged_by_the_covariance_of_its_two_ratios() -> None:
    log_r = np.array([0.3, 0.1, 0.3, 0.3, 0.3, 0.3])
    together = covariance(0.2)
    together[:2, :2] = 0.04 * np.array([[1, 0.999], [0.999, 1]])
    assert judge_rising(BATCHES, log_r, covariance(0.2), 10).non_decreasing is None
    assert judge_rising(BATCHES, log_r, together, 10).non_decreasing is False
    drop = judge_rising(BATCHES, log_r, covariance(0.2), 10).drop
    assert drop is not None
    assert drop.p == pytest.approx(stats.t.sf(0.2 / np.hypot(0.2, 0.2), 10))


def test_a_ratio_that_is_flat_is_seldom_called_falling_or_rising() -> None:
    """Holm keeps false refutations below 5 %; a slope of zero is above its interval in 5 %."""
    rng, said = np.random.default_rng(2), []
    for _ in range(1000):
        noise = rng.standard_normal((6, 2)) * 0.1
        sigma = 0.1 * np.sqrt(rng.chisquare(8) / 8)
        said.append(
            judge_rising(
                BATCHES, noise.mean(axis=1), covariance(sigma / np.sqrt(2)), 8
            ).non_decreasing
        )
    assert said.count(False) / 1000 < 0.06
    assert 0.02 < said.count(True) / 1000 < 0.08
