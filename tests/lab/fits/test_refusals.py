"""What cannot be fitted is refused in a sentence, and what the points do not tell is marked."""

from __future__ import annotations

import numpy as np
import pytest

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import Draws, join
from muonscale.lab.fits.crossing import amount_to
from muonscale.lab.fits.laws.batch import draw_batch, fit_batch
from muonscale.lab.fits.laws.chinchilla import draw_chinchilla, fit_chinchilla
from muonscale.lab.fits.laws.power import draw_power, fit_power
from muonscale.lab.fits.laws.power_offset import fit_power_offset
from muonscale.lab.fits.laws.quadratic import fit_minimum
from muonscale.lab.fits.leave_out import leave_rungs_out
from muonscale.lab.fits.result import Span
from muonscale.lab.fits.status import FitStatus

N = np.array([1e8, 1e8, 1e8, 1e9, 1e9, 1e9, 1e10, 1e10, 1e10])
D = np.array([1e9, 1e10, 1e11] * 3)
LOSS = 1.69 + 406.4 / N**0.34 + 410.7 / D**0.28
X = np.geomspace(1e17, 1e20, 4)
THREE = X[:3], 2.5 * X[:3] ** -0.05


REFUSED = {
    "two sizes": (lambda: fit_power([1, 10], [3, 2]), "at least 3 different sizes, got 2"),
    "one size thrice": (lambda: fit_power([10, 10, 10], [3, 2, 2.5]), "3 different sizes, got 1"),
    "no points": (lambda: fit_power([], []), "got 0"),
    "unequal lengths": (lambda: fit_power([1, 2, 3], [3, 2]), "one length"),
    "zero": (lambda: fit_power([0, 1, 2], [3, 2, 1]), "size of point 1 is 0"),
    "negative": (lambda: fit_power([1, 2, 3], [3, -2, 1]), "loss of point 2 is -2"),
    "not a number": (lambda: fit_power([1, 2, 3], [3, 2, np.nan]), "loss of point 3 is nan"),
    "infinite": (lambda: fit_batch([1, 2, np.inf], [3, 2, 1]), "batch of point 3 is inf"),
    "three sizes for three parameters": (lambda: fit_power_offset(*THREE), "at least 4"),
    "a loss that rises": (lambda: fit_power_offset(X, [1, 2, 3, 4]), "do not fall"),
    "five runs": (lambda: fit_chinchilla(N[:5], D[:5], LOSS[:5]), "at least 6 runs"),
    "repeats are no settings": (
        lambda: fit_chinchilla(np.tile(N[:5], 3), np.tile(D[:5], 3), np.tile(LOSS[:5], 3)),
        "at least 6 runs of different N or D, got 5",
    ),
    "two N": (
        lambda: fit_chinchilla(N[:6], D[:6], LOSS[:6]),
        "different parameter counts N, got 2",
    ),
    "two D": (lambda: fit_chinchilla(D[:6], N[:6], LOSS[:6]), "different token counts D, got 2"),
    "D = 20 N": (
        lambda: fit_chinchilla(np.geomspace(1e8, 1e10, 9), 20 * np.geomspace(1e8, 1e10, 9), LOSS),
        "go together",
    ),
    "one budget": (
        lambda: fit_chinchilla(np.geomspace(1e8, 1e10, 9), 1e20 / np.geomspace(1e8, 1e10, 9), LOSS),
        "correlate by -1.0000",
    ),
    "no effect of N": (
        lambda: fit_chinchilla(N, D, 2 + 410.7 / D**0.28),
        "not fall with parameters",
    ),
    "no effect of D": (lambda: fit_chinchilla(N, D, 2 + 406.4 / N**0.34), "not fall with tokens"),
    "two batches": (lambda: fit_batch([1, 2, 2], [3, 2, 2]), "3 different batch sizes, got 2"),
    "interval of three points": (lambda: draw_power(*THREE), "at least 4 points, got 3"),
    "interval of a batch law of three": (
        lambda: draw_batch(fit_batch([1, 2, 4], [9, 6, 4]), [1, 2, 4], [9, 6, 4]),
        "at least 4 points",
    ),
    "interval of six runs": (
        lambda: draw_chinchilla(fit_chinchilla(N, D, LOSS), N[:6], D[:6], LOSS[:6]),
        "at least 7 points",
    ),
    "few resamples": (lambda: draw_power(X, X**-0.1, resamples=20), "resamples=20"),
    "laws drawn apart": (
        lambda: join(draw_power(X, X**-0.1, 100), draw_power(X, X**-0.1, 200)),
        "drawn alike",
    ),
    "minimum of two": (lambda: fit_minimum([1, 2], [3, 2]), "at least 3 different x"),
    "minimum at the low end": (
        lambda: fit_minimum([1e-3, 1e-2, 1e-1], [1, 2, 3], name="lr"),
        "lowest lr, 0.001; measure below",
    ),
    "minimum at the high end": (
        lambda: fit_minimum([1e-3, 1e-2, 1e-1], [3, 2, 1], name="lr"),
        "highest lr, 0.1; measure above",
    ),
    "next to a diverged run": (
        lambda: fit_minimum([1e-3, 1e-2, 1e-1], [3, 2, np.nan], name="lr"),
        "lr 0.1, next to the best one at 0.01, diverged",
    ),
    "all diverged": (
        lambda: fit_minimum([1, 2, 3], [np.inf, np.nan, np.nan]),
        "every run diverged",
    ),
    "no valley": (
        lambda: fit_minimum([1, 2, 4, 8, 16], [1, 5, 4.9, 5, 1.1], around=2),
        "no interior minimum",
    ),
    "a hill around the lowest": (
        lambda: fit_minimum([1, 2, 4, 8, 16], [3.0, 5.2, 3.0 - 0.1, 5.2, 3.0], around=2),
        "no valley",
    ),
    "one measurement": (lambda: amount_to(2, [1], [3]), "at least 2"),
    "amounts that fall": (lambda: amount_to(2, [1, 3, 2], [4, 3, 1]), "measurement 2 is at 3"),
    "a target of zero": (lambda: amount_to(0, [1, 2], [3, 1]), "target of point 1 is 0"),
    "two rungs": (lambda: leave_rungs_out([1, 2], [1, 1], lambda kept: np.ones(2)), "3 rungs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case: str) -> None:
    fit, said = REFUSED[case]
    with pytest.raises(StudyError) as error:
        fit()
    assert said in str(error.value)


def test_a_loss_that_falls_to_nothing_hits_the_bound_of_its_constant() -> None:
    found = fit_chinchilla(N, D, 406.4 / N**0.34 + 410.7 / D**0.28)
    assert found.status is FitStatus.BOUND_HIT and found.E < 1e-3
    assert fit_power_offset(X, 2.5 * X**-0.2).status is FitStatus.BOUND_HIT


def test_a_batch_law_without_one_of_its_terms_hits_the_bound() -> None:
    batch = 2.0 ** np.arange(5, 12)
    assert fit_batch(batch, 1e6 / batch).status is FitStatus.BOUND_HIT
    assert fit_batch(batch, np.full(7, 300.0)).status is FitStatus.BOUND_HIT
    assert fit_batch(batch, 300 + 1e5 / batch).status is FitStatus.CONVERGED


def test_predictions_say_where_they_are_extrapolated() -> None:
    law = fit_chinchilla(N, D, LOSS)
    assert not law.predict(1e10, 1e11).extrapolated
    assert law.predict(2e10, 1e10).extrapolated and law.predict(1e9, 2e11).extrapolated
    power = fit_power(X, 2.5 * X**-0.05)
    assert not power.predict(1e17).extrapolated and power.predict(1.1e20).extrapolated
    assert power.predict(1e21).value == pytest.approx(2.5 * 1e21**-0.05)
    assert power.reach(2.5 * 1e22**-0.05).extrapolated
    batch = fit_batch([1, 2, 4, 8], 100 + 1000 / np.array([1, 2, 4, 8]))
    assert batch.critical.value == pytest.approx(10) and batch.critical.extrapolated
    assert batch.with_overhead(1).value == pytest.approx(1.2 + 10 / 5)
    assert not batch.with_overhead(1).extrapolated
    assert Span(1, 2).outside([0.5, 1, 2, 3]).tolist() == [True, False, False, True]


def test_a_law_without_draws_has_no_interval() -> None:
    found = Draws.none(np.array([1.0, 2.0])).parameter(1)
    assert found.value == 2 and np.isnan(found.low) and np.isnan(found.high)
