"""Intervals that hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from muonscale.lab.fits.allocation import log_best_loss, log_parameters, log_reach, log_tokens
from muonscale.lab.fits.bootstrap import Draws, join
from muonscale.lab.fits.laws.batch import BatchLaw
from muonscale.lab.fits.laws.chinchilla import ChinchillaLaw
from muonscale.lab.fits.laws.power import PowerLaw
from muonscale.lab.fits.laws.power_offset import OffsetPowerLaw
from muonscale.lab.fits.leave_out import leave_rungs_out
from muonscale.lab.fits.ratios import DrawnLaw, compare_flops
from muonscale.lab.fits.statistics import estimate_seed_noise


def power_table(points: int, noise: float, seed: int, a: float = 2.5) -> tuple[np.ndarray, ...]:
    flops = np.geomspace(1e17, 1e19, points)
    rng = np.random.default_rng(seed)
    return flops, a * flops**-0.052 * np.exp(noise * rng.standard_normal(points))


@pytest.mark.parametrize("points", [5, 8])
def test_intervals_of_a_power_law_hold_the_truth(points: int) -> None:
    """Of 400 tables 90 % +- 1.5 % (a standard error) should; the plain percentile interval of five
    points holds 79 %."""
    truth, held = np.array([np.log(2.5), 0.052]), np.zeros(2)
    for seed in range(400):
        draws = PowerLaw.fit(*power_table(points, 0.003, seed)).draw(200, seed)
        ends = [draws.parameter(place) for place in range(2)]
        held += [end.low <= value <= end.high for end, value in zip(ends, truth, strict=True)]
    assert np.all(held / 400 > 0.85) and np.all(held / 400 < 0.95)


def test_an_interval_with_known_noise_is_the_normal_one() -> None:
    """Of a line through points of equal noise the variance of the slope is in every textbook."""
    flops, loss = power_table(6, 0.003, 0)
    found = PowerLaw.fit(flops, loss).draw(20_000, noise=0.01).parameter(1)
    spread = 0.01 / np.sqrt(np.sum((np.log(flops) - np.log(flops).mean()) ** 2))
    assert found.high - found.value == pytest.approx(1.645 * spread, rel=0.04)
    assert found.value - found.low == pytest.approx(1.645 * spread, rel=0.04)


def test_an_interval_of_many_points_is_students() -> None:
    flops, loss = power_table(40, 0.01, 4)
    law = PowerLaw.fit(flops, loss)
    found = law.draw(20_000).parameter(1)
    spread = law.residuals.rms / np.sqrt(np.sum((np.log(flops) - np.log(flops).mean()) ** 2))
    width = 2 * t.ppf(0.95, 38) * spread
    assert found.high - found.low == pytest.approx(width, rel=0.04)


def test_a_wider_level_is_a_wider_interval() -> None:
    law = PowerLaw.fit(*power_table(6, 0.003, 0))
    ends = [law.draw(4000, level=level).parameter(1) for level in (0.5, 0.9, 0.99)]
    widths = [end.high - end.low for end in ends]
    assert widths[0] < widths[1] < widths[2]


def test_draws_are_those_of_their_seed() -> None:
    law = PowerLaw.fit(*power_table(6, 0.003, 0))
    same, again, other = (law.draw(100, seed).samples for seed in (1, 1, 2))
    assert np.array_equal(same, again) and not np.array_equal(same, other)
    assert not np.array_equal(law.draw(100, (1, 1)).samples, same)


def chinchilla_table(side: int, noise: float, seed: int) -> tuple[np.ndarray, ...]:
    n, d = np.meshgrid(np.geomspace(4e7, 1.6e10, side), np.geomspace(1e9, 4e11, side))
    n, d = n.ravel(), d.ravel()
    rng = np.random.default_rng(seed)
    loss = (1.69 + 406.4 / n**0.34 + 410.7 / d**0.28) * np.exp(noise * rng.standard_normal(len(n)))
    return n, d, loss


TRUTH = np.array([np.log(406.4), np.log(410.7), np.log(1.69), 0.34, 0.28])


@pytest.mark.slow
def test_intervals_of_a_chinchilla_law_hold_the_truth() -> None:
    held = np.zeros(5)
    for seed in range(40):
        table = chinchilla_table(6, 0.005, seed)
        draws = ChinchillaLaw.fit(*table).draw(100, seed)
        ends = [draws.parameter(place) for place in range(5)]
        held += [end.low <= value <= end.high for end, value in zip(ends, TRUTH, strict=True)]
    assert np.all(held / 40 >= 0.775)  # 90 % less two and a half standard errors


def test_refits_from_the_fit_are_fits_from_scratch() -> None:
    """A resample is a table with some runs several times: fit that table anew."""
    n, d, loss = chinchilla_table(5, 0.005, 0)
    law = ChinchillaLaw.fit(n, d, loss)
    draws = law.draw(100, seed=7)
    counts = np.random.default_rng(7).multinomial(25, np.full(25, 1 / 25), 100)
    for place in (0, 50, 99):
        rows = np.repeat(np.arange(25), counts[place])
        anew = ChinchillaLaw.fit(n[rows], d[rows], loss[rows])
        assert draws.samples[place] == pytest.approx(anew.theta, rel=1e-4)
    assert draws.failed == 0


def test_known_noise_spreads_a_chinchilla_law() -> None:
    n, d, loss = chinchilla_table(5, 0.0, 0)
    law = ChinchillaLaw.fit(n, d, loss)
    widths = []
    for noise in (0.001, 0.002):
        found = law.draw(200, noise=noise).parameter(3)
        assert found.low < 0.34 < found.high
        widths.append(found.high - found.low)
    assert widths[1] / widths[0] == pytest.approx(2, rel=0.2)


def test_other_laws_have_intervals_around_the_truth() -> None:
    rng = np.random.default_rng(2)
    x = 2.0 ** np.arange(5, 13)
    loss = (1.31 + 9 * x**-0.31) * np.exp(0.002 * rng.standard_normal(8))
    draws = OffsetPowerLaw.fit(x, loss).draw(300)
    assert [draws.parameter(i).low < v < draws.parameter(i).high for i, v in
            enumerate((np.log(1.31), np.log(9), 0.31))] == [True] * 3  # fmt: skip
    steps = (500 + 5e5 / x) * np.exp(0.03 * rng.standard_normal(8))
    draws = BatchLaw.fit(x, steps).draw(300)
    critical = draws.interval(lambda theta: theta[..., 1] - theta[..., 0])
    assert critical.low < np.log(1000) < critical.high
    assert critical.high - critical.low < 0.3


def test_the_allocation_is_the_best_of_all_models_of_that_budget() -> None:
    law = ChinchillaLaw.fit(*chinchilla_table(6, 0.0, 0))
    for flops in (1e20, 5.76e23):
        n = np.geomspace(1e6, 1e13, 400_001)
        losses = law(n, flops / 6 / n)
        parameters, tokens, loss = law.allocate(flops)
        assert parameters.value == pytest.approx(n[np.argmin(losses)], rel=1e-3)
        assert loss.value == pytest.approx(losses.min(), rel=1e-9)
        assert 6 * parameters.value * tokens.value == pytest.approx(flops)
        assert np.exp(log_tokens(law.theta, flops)) == pytest.approx(tokens.value)
        assert np.exp(log_best_loss(law.theta, flops)) == pytest.approx(losses.min(), rel=1e-9)
        assert np.exp(log_reach(law.theta, np.log(losses.min()))) == pytest.approx(flops, rel=1e-6)
    assert np.isinf(log_reach(law.theta, np.log(1.6)))
    assert not law.allocate(1e20)[2].extrapolated and law.holds(1e20)
    assert all(best.extrapolated for best in law.allocate(5.76e24)) and not law.holds(5.76e24)


def test_allocation_of_draws_is_that_of_each() -> None:
    theta = np.stack([TRUTH, TRUTH + np.array([0.1, 0, 0, 0, 0.01])])
    both = log_parameters(theta, 1e21)
    assert both.tolist() == [float(log_parameters(row, 1e21)) for row in theta]


def drawn_law(
    a: float, b: float, noise: float, seed: int, law_type: type[PowerLaw] = PowerLaw
) -> DrawnLaw[PowerLaw]:
    flops = np.geomspace(1e18, 1e20, 6)
    rng = np.random.default_rng(seed)
    law = law_type.fit(flops, a * flops**-b * np.exp(noise * rng.standard_normal(6)))
    return DrawnLaw(name="", law=law, draws=law.draw(400, (0, seed)))


class LargeModels(PowerLaw):
    """A law that is extrapolated below 2e19 FLOPs."""

    def holds(self, at: float) -> bool:
        return at > 2e19 and super().holds(at)


def test_the_ratio_of_flops_is_that_of_the_laws() -> None:
    """With one exponent it is (a1/a2)^(1/b), wherever."""
    muon, adamw = drawn_law(26, 0.052, 0, 1), drawn_law(27, 0.052, 0, 2)
    found = compare_flops(muon, adamw)
    wanted = (26 / 27) ** (1 / 0.052)
    assert [row.value for row in found.rows] == pytest.approx([wanted] * 5, rel=1e-6)
    assert not any(row.extrapolated for row in found.rows)
    far = compare_flops(muon, adamw, (1e18, 1e21))
    assert set(found.places) < set(far.places) and list(far.places) == sorted(far.places)
    marks = {place: row.extrapolated for place, row in zip(far.places, far.rows, strict=True)}
    assert marks.pop(1e18) and marks.pop(1e21)  # 1e18 is below what muon measured
    assert not any(marks.values()) and len(marks) == 5
    near = compare_flops(drawn_law(26, 0.052, 0, 1, LargeModels), adamw, (2e19, 8e19))
    marks = {place: row.extrapolated for place, row in zip(near.places, near.rows, strict=True)}
    assert marks[2e19] and not marks[8e19]  # muon takes half of them


@pytest.mark.slow
def test_the_band_of_the_ratio_holds_the_truth() -> None:
    truth, held = 2 * np.log(26 / 27) / (2 * 0.052), 0
    for seed in range(200):
        first, second = (
            drawn_law(a, 0.052, 0.002, 2 * seed + place) for place, a in enumerate((26, 27))
        )
        found = compare_flops(first, second, (2e19,))
        row = found.rows[found.places.index(2e19)]
        held += row.low <= np.exp(truth) <= row.high
    assert 0.85 <= held / 200 <= 0.97


def test_a_ratio_to_a_law_that_does_not_get_there_has_no_end() -> None:
    law = PowerLaw.fit([1, 3, 10], np.array([1.0, 3, 10]) ** -0.05)
    slopes = [[0.0, 0.05], [0.0, -0.01], [0.0, -0.02]]
    stuck = DrawnLaw(name="a", law=law, draws=Draws(law.theta, np.array(slopes), 0.9))
    steady = DrawnLaw(name="b", law=law, draws=Draws(law.theta, np.full((3, 2), [0.0, 0.05]), 0.9))
    found = compare_flops(stuck, steady, (5.0,))
    row = found.rows[found.places.index(5.0)]
    assert row.value == pytest.approx(1) and np.isinf(row.high)


def test_a_loss_is_reached_where_the_law_has_it() -> None:
    theta = np.array([[np.log(1.7), np.log(400), 0.15], [np.log(1.7), np.log(400), -0.1]])
    loss = OffsetPowerLaw.log_value(theta, 1e20)
    assert OffsetPowerLaw.log_reach(theta, loss).tolist() == [pytest.approx(np.log(1e20)), np.inf]
    assert np.isinf(OffsetPowerLaw.log_reach(theta[0], np.log(1.6)))


def test_joined_draws_keep_both_laws() -> None:
    first = PowerLaw.fit(*power_table(6, 0.003, 0)).draw(100)
    second = PowerLaw.fit(*power_table(6, 0.003, 1)).draw(100)
    both = join(first, second)
    assert np.array_equal(both.samples[:, :2], first.samples)
    assert np.array_equal(both.estimate[2:], second.estimate)
    assert join(first, Draws.none(second.estimate)).samples.shape == (0, 4)


def test_a_rung_left_out_is_not_used() -> None:
    """A power law with the last rung 10 % above it: the others do not know, and miss it by that."""
    flops = np.repeat(np.geomspace(1e17, 1e20, 4), 2)
    loss = 2.5 * flops**-0.05
    loss[-2:] *= 1.1
    found = leave_rungs_out(flops, loss, lambda kept: PowerLaw.fit(flops[kept], loss[kept])(flops))
    assert [round(np.log10(item.rung)) for item in found] == [17, 18, 19, 20]
    assert [item.points for item in found] == [2] * 4
    assert [item.extrapolated for item in found] == [True, False, False, True]
    assert found[-1].error == pytest.approx(np.log(1.1), rel=1e-6)
    assert found[0].error > 0.01


def test_close_sizes_are_one_rung_but_labels_are_not() -> None:
    sizes = np.array([1.0, 1.002, 1.029, 1.031, 2, 3, 3.001])

    def count_points(width: float) -> list[int]:
        left_out = leave_rungs_out(sizes, sizes, lambda kept: np.ones(7), width)
        return [item.points for item in left_out]

    assert count_points(0.03) == [3, 1, 1, 2]
    assert count_points(0.0) == [1] * 7


def test_a_rung_that_is_needed_is_named() -> None:
    flops = np.geomspace(1e17, 1e19, 3)
    found = leave_rungs_out(
        flops, flops**-0.1, lambda kept: PowerLaw.fit(flops[kept], flops[kept])(flops)
    )
    assert all(item.error is None and "3 different sizes" in item.refused for item in found)


def test_seed_noise_is_pooled_over_repeated_settings() -> None:
    loss = np.exp([0.0, 0.2, 1.0, 1.4, 5.0])
    found = estimate_seed_noise([[1, 1, 2, 2, 3]], loss)
    assert found == pytest.approx(np.sqrt((0.02 + 0.08) / 2))
    assert estimate_seed_noise([[1, 1, 2], [1, 2, 1]], [1, 2, 3]) is None
