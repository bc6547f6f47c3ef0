from __future__ import annotations

import math

import numpy as np
import pytest

from muonscale.errors import StudyError
from muonscale.lab.fits.frontier import IsoLoss, judge_dominance, mean_log_seconds, trace_iso_loss
from muonscale.lab.fits.steps_to_loss import StepsToLoss

INF = math.inf


def measured(
    batches: list[float], steps: list[float], error: float = 0.01, freedom: int = 1000
) -> StepsToLoss:
    return StepsToLoss(
        batches=np.array(batches, np.float64),
        log_steps=np.log(steps),
        error=np.full(len(batches), error if freedom else math.nan),
        freedom=freedom,
    )


def curve(
    steps: StepsToLoss, fixed: float, per_token: float, devices: list[int], seed: int = 0
) -> IsoLoss:
    """Return the curve for steps of `fixed + per_token * B / n` seconds and sequences of one token."""
    seconds = [
        [fixed + per_token * b / n if b % n == 0 else INF for b in steps.batches] for n in devices
    ]
    return trace_iso_loss(steps, np.array(seconds), devices, 1, seed=seed)


def test_a_hand_made_example_of_two_batches_and_three_devices() -> None:
    # 2 tokens: 100 steps; 8 tokens: 40. A step takes 1 + B/n seconds; 2 tokens feed no 8 devices.
    found = curve(measured([2, 8], [100, 40]), 1, 1, [1, 2, 8])
    assert found.seconds == pytest.approx([100 * 3, 40 * 5, 40 * 2])
    assert found.batch.tolist() == [2, 8, 8]
    assert found.device_seconds == pytest.approx([300, 400, 640])
    # 2 tokens could be 1 on one device; 8 tokens on 8 devices could be more.
    assert found.edges == ("low", "high", "high")
    assert found.efficient.tolist() == [True, True, True]


def test_known_laws_have_their_exact_minimum() -> None:
    # (Smin + Emin/B)(f + p B/n) is least at B = sqrt(Emin f n / (Smin p)), where it is
    # (sqrt(Smin f) + sqrt(Emin p / n))^2.
    smin, emin, f, p = 50.0, 50 * 2.0**12, 0.4, 0.1
    devices = [1, 4, 16, 64]
    batches = 2.0 ** np.arange(2, 17)
    found = curve(measured(batches.tolist(), (smin + emin / batches).tolist()), f, p, devices)
    n = np.array(devices)
    assert found.batch == pytest.approx(np.sqrt(emin * f * n / (smin * p)))
    assert found.seconds == pytest.approx((np.sqrt(smin * f) + np.sqrt(emin * p / n)) ** 2)
    assert found.edges == (None,) * 4 and found.known.all()


def test_no_edge_where_nothing_smaller_can_be_shared() -> None:
    steps = measured([4, 8, 16], [100, 99, 98])  # smaller is better throughout
    assert curve(steps, 0.001, 1, [2, 4, 8]).edges == ("low", None, None)
    unreached = measured([4, 8, 16, 32], [100, 99, 98, INF])
    assert curve(unreached, 0.001, 1, [16, 32]).edges == ("high", None)
    assert curve(unreached, 0.001, 1, [16, 32]).seconds[1] == INF
    assert np.isnan(curve(unreached, 0.001, 1, [16, 32]).batch[1])


def test_more_devices_that_are_no_faster_are_not_on_the_frontier() -> None:
    steps = measured([8], [10])
    found = trace_iso_loss(steps, np.array([[4.0], [2.0], [2.0], [3.0], [1.0]]), [1, 2, 3, 4, 8], 1)
    assert found.efficient.tolist() == [True, True, False, False, True]


def test_a_band_holds_the_truth_in_nine_of_ten() -> None:
    # One batch is best by far at each count, so that the time is as noisy as its steps.
    truth, error = np.log([400.0, 100.0, 90.0]), 0.05
    generator = np.random.default_rng(5)
    times = curve(measured([1, 4, 16], np.exp(truth).tolist()), 1, 0.1, [1, 2, 4]).seconds
    inside = []
    for number in range(300):
        steps = np.exp(truth + error * generator.standard_normal(3)).tolist()
        low, high = curve(measured([1, 4, 16], steps, error), 1, 0.1, [1, 2, 4], number).band()
        inside.append((low <= times) & (times <= high))
    assert np.mean(inside) == pytest.approx(0.9, abs=0.03)


def test_the_best_batch_is_chosen_anew_in_every_draw() -> None:
    # The least of four equal, independent log times with noise 0.1 has a median of
    # z(0.5^(1/4)) = -0.998 standard deviations.
    steps = measured([1, 2, 4, 8], [100] * 4, 0.1)
    found = trace_iso_loss(steps, np.ones((1, 4)), [1], 1, resamples=4000)
    draws = np.quantile(found.log_seconds(found.draws.samples), 0.5)
    assert draws == pytest.approx(math.log(100) - 0.0998, abs=0.005)


DEVICES = [1, 4, 16]
BATCHES = (2.0 ** np.arange(0, 14)).tolist()


def law(factor: float, seed: int, error: float = 0.01, freedom: int = 1000, **at: float) -> IsoLoss:
    """Return a curve with its best batches inside, `factor` times slower; `at` of one device count."""
    steps = [factor * (50 + 50 * 2**6 / b) for b in BATCHES]
    found = measured(BATCHES, steps, error, freedom)
    seconds = np.array(
        [[0.4 + 0.1 * b / n if b % n == 0 else INF for b in BATCHES] for n in DEVICES]
    )
    seconds *= np.array([at.get(f"on{n}", 1.0) for n in DEVICES])[:, None]
    return trace_iso_loss(found, seconds, DEVICES, 1, seed=seed)


def test_a_faster_optimizer_lies_inside() -> None:
    found = judge_dominance(law(1.0, 0), law(1.25, 1))
    assert found.inside is True and found.share == 1 and found.reverse == 0
    assert found.judged.all()
    assert found.ratio == pytest.approx([0.8] * 3)
    assert (found.low < 0.8).all() and (found.high > 0.8).all()
    assert found.mean.value == pytest.approx(0.8)
    assert found.mean.low < 0.8 < found.mean.high
    assert judge_dominance(law(1.25, 1), law(1.0, 0)).inside is False


def test_curves_that_cross_or_are_within_noise_are_not_significantly_different() -> None:
    crossing = judge_dominance(law(1.0, 0, on16=1.5), law(1.25, 1))
    assert crossing.inside is None and crossing.share == 0 and crossing.reverse == 0
    assert crossing.ratio == pytest.approx([0.8, 0.8, 1.2])
    close = judge_dominance(law(1.0, 0, 0.05), law(1.02, 1, 0.05))
    assert close.inside is None and 0.05 < close.share < 0.95


def test_dominance_is_of_all_counts_in_the_same_draw() -> None:
    # Each count alone is faster with p = 0.97; three independent ones together with 0.97^3 = 0.91.
    # A batch for each count, so that their noises are independent.
    z = 1.8808  # normal quantile of 0.97
    seconds = np.array([[INF, 1, INF, INF, INF], [INF, INF, 1, INF, INF], [INF, INF, INF, 1, INF]])
    first = trace_iso_loss(
        measured([1, 2, 4, 8, 16], [100] * 5, 0.1), seconds, [1, 2, 4], 1, 20_000
    )
    slower = [100 * math.exp(z * 0.1 * math.sqrt(2))] * 5
    second = trace_iso_loss(
        measured([1, 2, 4, 8, 16], slower, 0.1), seconds, [1, 2, 4], 1, 20_000, seed=1
    )
    found = judge_dominance(first, second)
    assert found.share == pytest.approx(0.97**3, abs=0.01)
    assert found.inside is None


def test_an_upper_bound_of_the_slower_is_not_judged() -> None:
    def only(batches: list[float], factor: float, seed: int) -> IsoLoss:
        steps = [factor * (50 + 50 * 2**6 / b) for b in batches]
        return curve(measured(batches, steps), 0.4, 0.1, DEVICES, seed)

    # The best batches are 16, 32 and 64: with up to 32 the last is at the end.
    short, whole = BATCHES[:6], BATCHES
    assert judge_dominance(only(whole, 1, 0), only(short, 1.25, 1)).judged.tolist() == [
        True,
        False,
        False,
    ]
    assert judge_dominance(only(whole, 1, 0), only(short, 1.25, 1)).inside is True
    # The faster one's bounds do not matter, since its true times are shorter still.
    both = judge_dominance(only(short, 1, 0), only(whole, 1.25, 1))
    assert both.judged.all() and both.inside is True
    none = judge_dominance(only(whole, 1, 0), only(BATCHES[4:5], 1.25, 1))
    assert not none.judged.any() and math.isnan(none.share) and none.inside is None


def test_an_optimizer_that_reached_nothing_at_a_count_is_not_inside_there() -> None:
    first = law(1.0, 0, on16=INF)
    found = judge_dominance(first, law(1.25, 1))
    assert found.ratio.tolist()[2] == INF
    assert found.share == 0 and found.inside is None
    assert np.isnan(judge_dominance(first, law(1.25, 1, on16=INF)).ratio[2])
    assert math.isnan(judge_dominance(law(1.0, 0, on1=INF), law(1.25, 1, on1=INF)).mean.value)


def test_one_seed_has_no_band_and_no_verdict() -> None:
    alone = law(1.0, 0, freedom=0)
    assert np.isnan(alone.band()).all()
    found = judge_dominance(alone, law(1.25, 1))
    assert not found.drawn and found.inside is None and math.isnan(found.share)
    assert found.ratio == pytest.approx([0.8] * 3) and np.isnan(found.low).all()


def test_the_mean_is_the_hypervolume_over_the_width() -> None:
    # Counted point by point: what the staircase covers of a box up to 2 x the most devices.
    devices, times = np.array([1.0, 4.0, 16.0]), np.log([100.0, 120.0, 10.0])
    x = np.linspace(0, math.log(32), 40_001)[:-1]
    best = [min(t for n, t in zip(devices, times, strict=True) if math.log(n) <= a) for a in x]
    volume = np.mean(math.log(1000) - np.array(best)) * math.log(32)
    found = mean_log_seconds(times, devices)
    assert math.log(1000) * math.log(32) - volume == pytest.approx(found * math.log(32), rel=1e-4)


def test_what_cannot_be_is_refused() -> None:
    steps = measured([1, 2], [10, 5])
    with pytest.raises(StudyError, match=r"3 device counts .* 2 batch sizes, got shape \(2, 2\)"):
        trace_iso_loss(steps, np.ones((2, 2)), [1, 2, 4], 1)
    with pytest.raises(StudyError, match="above 0"):
        trace_iso_loss(steps, np.zeros((1, 2)), [1], 1)
    with pytest.raises(StudyError, match=r"\[2, 1\]"):
        trace_iso_loss(steps, np.ones((2, 2)), [2, 1], 1)
    with pytest.raises(StudyError, match=r"\[1.0, 4.0, 16.0\] and \[1.0, 2.0\]"):
        judge_dominance(law(1, 0), trace_iso_loss(steps, np.ones((2, 2)), [1, 2], 1))
