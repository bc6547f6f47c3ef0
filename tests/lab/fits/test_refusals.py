"""What cannot be fitted is refused in a sentence, and what the points do not tell is marked."""

from __future__ import annotations

import numpy as np
import pytest

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import Draws, join
from muonscale.lab.fits.crossing import find_crossing
from muonscale.lab.fits.laws.batch import BatchLaw
from muonscale.lab.fits.laws.chinchilla import ChinchillaLaw
from muonscale.lab.fits.laws.power import PowerLaw
from muonscale.lab.fits.laws.power_offset import OffsetPowerLaw
from muonscale.lab.fits.laws.quadratic import fit_minimum
from muonscale.lab.fits.leave_out import leave_rungs_out
from muonscale.lab.fits.result import FitStatus, SizeRange

N = np.array([1e8, 1e8, 1e8, 1e9, 1e9, 1e9, 1e10, 1e10, 1e10])
D = np.array([1e9, 1e10, 1e11] * 3)
SIX = [0, 1, 2, 4, 6, 8]
"""Six of these runs that determine a law."""
LOSS = 1.69 + 406.4 / N**0.34 + 410.7 / D**0.28
X = np.geomspace(1e17, 1e20, 4)
THREE = X[:3], 2.5 * X[:3] ** -0.05


REFUSED = {
    "two sizes": (lambda: PowerLaw.fit([1, 10], [3, 2]), "at least 3 different sizes, got 2"),
    "one size thrice": (
        lambda: PowerLaw.fit([10, 10, 10], [3, 2, 2.5]),
        "3 different sizes, got 1",
    ),
    "no points": (lambda: PowerLaw.fit([], []), "got 0"),
    "unequal lengths": (lambda: PowerLaw.fit([1, 2, 3], [3, 2]), "(3,)"),
    "zero": (lambda: PowerLaw.fit([0, 1, 2], [3, 2, 1]), "size of point 1 is 0"),
    "negative": (lambda: PowerLaw.fit([1, 2, 3], [3, -2, 1]), "loss of point 2 is -2"),
    "not a number": (lambda: PowerLaw.fit([1, 2, 3], [3, 2, np.nan]), "loss of point 3 is nan"),
    "infinite": (lambda: BatchLaw.fit([1, 2, np.inf], [3, 2, 1]), "batch of point 3 is inf"),
    "three sizes for three parameters": (lambda: OffsetPowerLaw.fit(*THREE), "at least 4"),
    "a loss that rises": (lambda: OffsetPowerLaw.fit(X, [1, 2, 3, 4]), "do not fall"),
    "five runs": (lambda: ChinchillaLaw.fit(N[:5], D[:5], LOSS[:5]), "at least 6 runs"),
    "repeats are no settings": (
        lambda: ChinchillaLaw.fit(np.tile(N[:5], 3), np.tile(D[:5], 3), np.tile(LOSS[:5], 3)),
        "at least 6 runs of different N or D, got 5",
    ),
    "two N": (
        lambda: ChinchillaLaw.fit(N[:6], D[:6], LOSS[:6]),
        "different parameter counts N, got 2",
    ),
    "two D": (lambda: ChinchillaLaw.fit(D[:6], N[:6], LOSS[:6]), "different token counts D, got 2"),
    "D = 20 N": (
        lambda: ChinchillaLaw.fit(
            np.geomspace(1e8, 1e10, 9), 20 * np.geomspace(1e8, 1e10, 9), LOSS
        ),
        "correlate by 1.0000",
    ),
    "one budget": (
        lambda: ChinchillaLaw.fit(
            np.geomspace(1e8, 1e10, 9), 1e20 / np.geomspace(1e8, 1e10, 9), LOSS
        ),
        "correlate by -1.0000",
    ),
    "no effect of N": (
        lambda: ChinchillaLaw.fit(N, D, 2 + 410.7 / D**0.28),
        "with parameters N",
    ),
    "no effect of D": (lambda: ChinchillaLaw.fit(N, D, 2 + 406.4 / N**0.34), "with tokens D"),
    "two batches": (lambda: BatchLaw.fit([1, 2, 2], [3, 2, 2]), "3 different batch sizes, got 2"),
    "interval of three points": (lambda: PowerLaw.fit(*THREE).draw(), "at least 4 points, got 3"),
    "interval of a batch law of three": (
        lambda: BatchLaw.fit([1, 2, 4], [9, 6, 4]).draw(),
        "at least 4 points",
    ),
    "interval of six runs": (
        lambda: ChinchillaLaw.fit(N[SIX], D[SIX], LOSS[SIX]).draw(),
        "at least 7 points",
    ),
    "few resamples": (lambda: PowerLaw.fit(X, X**-0.1).draw(20), "resamples=20"),
    "laws drawn apart": (
        lambda: join(*(PowerLaw.fit(X, X**-0.1).draw(n) for n in (100, 200))),
        "100 draws at 0.9 and 200",
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
        "lr 0.1, next to the best one at 0.01",
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
        "around x 4",
    ),
    "one measurement": (lambda: find_crossing(2, [1], [3]), "at least 2"),
    "amounts that fall": (lambda: find_crossing(2, [1, 3, 2], [4, 3, 1]), "measurement 2 is at 3"),
    "a target of zero": (lambda: find_crossing(0, [1, 2], [3, 1]), "target of point 1 is 0"),
    "two rungs": (lambda: leave_rungs_out([1, 2], [1, 1], lambda kept: np.ones(2)), "3 rungs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case: str) -> None:
    fit, said = REFUSED[case]
    with pytest.raises(StudyError) as error:
        fit()
    assert said in str(error.value)


def test_a_loss_that_falls_to_nothing_hits_the_bound_of_its_constant() -> None:
    found = ChinchillaLaw.fit(N, D, 406.4 / N**0.34 + 410.7 / D**0.28)
    assert found.status is FitStatus.BOUND_HIT and found.E < 1e-3
    assert OffsetPowerLaw.fit(X, 2.5 * X**-0.2).status is FitStatus.BOUND_HIT


def test_a_batch_law_without_one_of_its_terms_hits_the_bound() -> None:
    batch = 2.0 ** np.arange(5, 12)
    assert BatchLaw.fit(batch, 1e6 / batch).status is FitStatus.BOUND_HIT
    assert BatchLaw.fit(batch, np.full(7, 300.0)).status is FitStatus.BOUND_HIT
    assert BatchLaw.fit(batch, 300 + 1e5 / batch).status is FitStatus.CONVERGED


def test_predictions_say_where_they_are_extrapolated() -> None:
    law = ChinchillaLaw.fit(N, D, LOSS)
    assert not law.predict(1e10, 1e11).extrapolated
    assert law.predict(2e10, 1e10).extrapolated and law.predict(1e9, 2e11).extrapolated
    power = PowerLaw.fit(X, 2.5 * X**-0.05)
    assert not power.predict(1e17).extrapolated and power.predict(1.1e20).extrapolated
    assert power.predict(1e21).value == pytest.approx(2.5 * 1e21**-0.05)
    batch = BatchLaw.fit([1, 2, 4, 8], 100 + 1000 / np.array([1, 2, 4, 8]))
    assert batch.critical.value == pytest.approx(10) and batch.critical.extrapolated
    assert batch.with_overhead(1).value == pytest.approx(1.2 + 10 / 5)
    assert not batch.with_overhead(1).extrapolated
    assert [SizeRange(1, 2).holds(x) for x in (0.5, 1, 2, 3)] == [False, True, True, False]


def test_a_law_without_draws_has_no_interval() -> None:
    found = Draws.none(np.array([1.0, 2.0])).parameter(1)
    assert found.value == 2 and np.isnan(found.low) and np.isnan(found.high)
