"""Laws recovered from losses that obey them, and fits compared with searches that share no code."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime, least_squares, linprog

from muonscale.lab.fits.laws.batch import BatchLaw
from muonscale.lab.fits.laws.chinchilla import ChinchillaLaw
from muonscale.lab.fits.laws.power import PowerLaw
from muonscale.lab.fits.laws.power_offset import OffsetPowerLaw
from muonscale.lab.fits.minimize import sum_huber
from muonscale.lab.fits.result import FitStatus

# E, A, B, alpha, beta: Chinchilla's (arXiv 2203.15556), its replication's (arXiv 2404.10102), others.
CHINCHILLAS = [
    (1.69, 406.4, 410.7, 0.34, 0.28),
    (1.8172, 482.01, 2085.43, 0.3478, 0.3658),
    (0.5, 20.0, 80.0, 0.15, 0.2),
    (2.5, 3e4, 900.0, 0.6, 0.35),
    (1.2, 50.0, 5e5, 0.2, 0.7),
]


def grid(sides: tuple[int, int] = (6, 6)) -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(np.geomspace(4e7, 1.6e10, sides[0]), np.geomspace(1e9, 4e11, sides[1]))
    return n.ravel(), d.ravel()


def chinchilla(law: tuple[float, ...], n: np.ndarray, d: np.ndarray) -> np.ndarray:
    E, A, B, alpha, beta = law
    return E + A / n**alpha + B / d**beta


@pytest.mark.parametrize("law", CHINCHILLAS)
def test_chinchilla_is_recovered(law: tuple[float, ...]) -> None:
    n, d = grid()
    found = ChinchillaLaw.fit(n, d, chinchilla(law, n, d))
    got = (found.E, found.A, found.B, found.alpha, found.beta)
    assert got == pytest.approx(law, rel=1e-6)
    assert found.status is FitStatus.CONVERGED and found.residuals.largest < 1e-9


def test_chinchilla_is_recovered_from_six_runs() -> None:
    n = np.array([4e7, 2e8, 1e9, 4e7, 2e8, 1e9])
    d = np.array([1e9, 1e9, 1e9, 2e10, 8e10, 3e11])
    found = ChinchillaLaw.fit(n, d, chinchilla(CHINCHILLAS[0], n, d))
    got = (found.E, found.A, found.B, found.alpha, found.beta)
    assert got == pytest.approx(CHINCHILLAS[0], rel=1e-6)


@pytest.mark.parametrize("a,b", [(2.506, 0.052), (2.608, 0.054), (1e4, 0.5), (3.0, -0.02)])
def test_a_power_law_is_recovered(a: float, b: float) -> None:
    flops = np.geomspace(1e17, 1e21, 5)
    found = PowerLaw.fit(flops, a * flops**-b)
    assert (found.coefficient, found.exponent) == pytest.approx((a, b), rel=1e-6)
    flops = np.exp(found.log_reach(found.theta, np.log(a * 1e19**-b)))
    assert flops == pytest.approx(1e19, rel=1e-6) or b < 0


@pytest.mark.parametrize("law", [(1.31, 9.0, 0.31), (0.5, 100.0, 0.7), (2.0, 3.0, 0.08)])
def test_a_power_law_with_offset_is_recovered(law: tuple[float, float, float]) -> None:
    width = 2.0 ** np.arange(5, 11)
    found = OffsetPowerLaw.fit(width, law[0] + law[1] * width ** -law[2])
    assert (found.offset, found.coefficient, found.exponent) == pytest.approx(law, rel=1e-6)
    assert found.status is FitStatus.CONVERGED


@pytest.mark.parametrize("law", [(500.0, 5e7), (1e4, 1e9), (3.0, 1e5)])
def test_a_batch_law_is_recovered(law: tuple[float, float]) -> None:
    batch = 2.0 ** np.arange(12, 22)
    found = BatchLaw.fit(batch, law[0] + law[1] / batch)
    assert (found.least_steps, found.least_data) == pytest.approx(law, rel=1e-6)
    assert found.critical.value == pytest.approx(law[1] / law[0], rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0.5, 3),
    st.floats(0.15, 0.8),
    st.floats(0.15, 0.8),
    st.floats(0.1, 1),
    st.floats(0.1, 1),
)
def test_any_chinchilla_whose_terms_show_is_recovered(
    E: float, alpha: float, beta: float, first: float, second: float
) -> None:
    """`first` and `second` are the terms in the middle of the grid."""
    n, d = grid()
    law = (E, first * 8e8**alpha, second * 2e10**beta, alpha, beta)
    found = ChinchillaLaw.fit(n, d, chinchilla(law, n, d))
    assert (found.E, found.A, found.B, found.alpha, found.beta) == pytest.approx(law, rel=1e-6)


@settings(max_examples=12, deadline=None)
@given(st.floats(1e-6, 1e6), st.integers(0, 9))
def test_units_of_size_do_not_matter(unit: float, seed: int) -> None:
    """Measuring N and D in other units changes A and B alone."""
    n, d = grid((4, 4))
    noise = 0.003 * np.random.default_rng(seed).standard_normal(len(n))
    loss = chinchilla(CHINCHILLAS[0], n, d) * np.exp(noise)
    one, other = ChinchillaLaw.fit(n, d, loss), ChinchillaLaw.fit(n * unit, d / unit, loss)
    assert (other.E, other.alpha, other.beta) == pytest.approx(
        (one.E, one.alpha, one.beta), rel=1e-4
    )
    assert other.A / unit**one.alpha == pytest.approx(one.A, rel=1e-2)


@pytest.mark.parametrize("delta", [1e-3, 1.0])
def test_gradient_of_the_objective_is_its_derivative(delta: float) -> None:
    n, d = grid((4, 5))
    rng = np.random.default_rng(0)
    target = np.log(chinchilla(CHINCHILLAS[0], n, d)) + 0.01 * rng.standard_normal(len(n))
    counts = rng.integers(0, 4, len(n)).astype(float)
    # Middle of the ranges as the unit, so that finite differences are accurate.
    model = ChinchillaLaw.log_model(np.log(n / 8e8), np.log(d / 2e10))
    theta = np.array([-0.9, -0.4, 0.5, 0.35, 0.3])
    _, gradient = sum_huber(model, theta, target, counts, delta)
    step = 1e-7 * np.ones(5)
    numeric = [
        (
            sum_huber(model, theta + step * unit, target, counts, delta)[0]
            - sum_huber(model, theta - step * unit, target, counts, delta)[0]
        )
        / 2e-7
        for unit in np.eye(5)
    ]
    assert gradient == pytest.approx(np.array(numeric), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "theta"),
    [
        (
            ChinchillaLaw.log_model(np.array([-1.0, 0.3, 2.0]), np.array([0.5, -2.0, 1.0])),
            [0.1, -0.4, 0.6, 0.3, 0.2],
        ),
        (OffsetPowerLaw.log_model(np.array([-1.0, 0.3, 2.0])), [0.2, 0.7, 0.3]),
        (BatchLaw.log_model(np.array([3.0, 5.0, 9.0])), [2.0, 7.0]),
    ],
)
def test_jacobians_are_derivatives(model, theta) -> None:
    numeric = approx_fprime(np.array(theta), lambda t: model(t)[0], 1e-7)
    assert model(np.array(theta))[1] == pytest.approx(numeric, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "seed"), list(product([0.002, 0.02], range(2))))
def test_no_start_of_a_published_grid_finds_a_lower_objective(noise: float, seed: int) -> None:
    """Hoffmann et al. start L-BFGS from a grid; here a trust-region search starts from one."""
    n, d = grid((5, 5))
    rng = np.random.default_rng(seed)
    loss = chinchilla(CHINCHILLAS[0], n, d) * np.exp(noise * rng.standard_normal(len(n)))
    found = ChinchillaLaw.fit(n, d, loss)

    def residuals(theta: np.ndarray) -> np.ndarray:
        terms = [theta[0] - theta[3] * np.log(n), theta[1] - theta[4] * np.log(d)]
        return np.logaddexp(np.logaddexp(*terms), theta[2]) - np.log(loss)

    def huber(theta: np.ndarray) -> float:
        size = np.abs(residuals(theta)) / 1e-3
        return float(np.sum(np.where(size <= 1, size**2 / 2, size - 0.5)))

    own = huber(found.theta)
    starts = product([0, 10, 20], [0, 10, 20], [0.0], [0.2, 1.0], [0.2, 1.0])
    for start in starts:
        other = least_squares(
            residuals, np.array(start, float), loss="huber", f_scale=1e-3, max_nfev=200
        )
        assert huber(other.x) >= own * (1 - 1e-6)


def test_a_power_law_is_the_line_through_the_logarithms() -> None:
    rng = np.random.default_rng(1)
    flops = np.geomspace(1e17, 1e21, 12)
    loss = 2.5 * flops**-0.05 * np.exp(0.01 * rng.standard_normal(12))
    slope, intercept = np.polyfit(np.log(flops), np.log(loss), 1)
    found = PowerLaw.fit(flops, loss)
    assert (-found.exponent, np.log(found.coefficient)) == pytest.approx((slope, intercept))
    misses = np.log(loss) - intercept - slope * np.log(flops)
    assert found.residuals.rms == pytest.approx(np.sqrt(np.sum(misses**2) / 10))
    assert found.residuals.largest == pytest.approx(np.abs(misses).max())


@pytest.mark.parametrize("seed", range(5))
def test_small_laws_are_least_squares_by_another_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = 2.0 ** np.arange(5, 13)
    loss = (1.31 + 9 * x**-0.31) * np.exp(0.003 * rng.standard_normal(len(x)))
    steps = (500 + 5e5 / x) * np.exp(0.05 * rng.standard_normal(len(x)))
    offset = OffsetPowerLaw.fit(x, loss)
    batch = BatchLaw.fit(x, steps)

    def best(residuals, starts) -> np.ndarray:
        tries = [least_squares(residuals, s, xtol=1e-14, ftol=1e-14, gtol=1e-14) for s in starts]
        return min(tries, key=lambda found: found.cost).x

    starts = product(np.log([0.5, 1.5]), np.log([3.0, 20.0]), [0.1, 0.5])
    other = best(lambda p: np.log(np.exp(p[0]) + np.exp(p[1]) * x ** -p[2]) - np.log(loss), starts)
    assert offset.theta == pytest.approx(other, rel=1e-5)
    starts = product([np.log(100), np.log(2000)], [np.log(1e5), np.log(1e7)])
    other = best(lambda p: np.log(np.exp(p[0]) + np.exp(p[1]) / x) - np.log(steps), starts)
    assert batch.theta == pytest.approx(other, rel=1e-6)


def test_outliers_do_not_move_a_huber_fit() -> None:
    """Least squares are moved by them: the sum of squares is minimised with a large delta."""
    n, d = grid()
    loss = chinchilla(CHINCHILLAS[0], n, d)
    loss[[3, 17, 30]] *= 1.2
    robust, squares = ChinchillaLaw.fit(n, d, loss), ChinchillaLaw.fit(n, d, loss, delta=10.0)
    assert (robust.E, robust.alpha, robust.beta) == pytest.approx((1.69, 0.34, 0.28), rel=5e-3)
    assert abs(squares.alpha / 0.34 - 1) > 0.05


def test_with_a_small_delta_the_fit_is_of_least_absolute_residuals() -> None:
    """With exponents and E nearly fixed by the grid, compare the sum with linear programming.

    Around the fit the law is linear in its parameters; no step may lower the sum of absolute values.
    """
    n, d = grid((5, 5))
    rng = np.random.default_rng(3)
    target = np.log(chinchilla(CHINCHILLAS[0], n, d)) + 0.02 * rng.standard_normal(len(n))
    found = ChinchillaLaw.fit(n, d, np.exp(target), delta=1e-5)
    predicted, jacobian = ChinchillaLaw.log_model(np.log(n), np.log(d))(found.theta)
    own = np.abs(target - predicted).sum()
    rows, columns = jacobian.shape
    scale = np.abs(jacobian).max(axis=0)
    A = np.block([[jacobian / scale, -np.eye(rows)], [-jacobian / scale, -np.eye(rows)]])
    b = np.concatenate([target - predicted, predicted - target])
    cost = np.concatenate([np.zeros(columns), np.ones(rows)])
    # Steps so small that the law is linear over them.
    bounds = [(-1e-3, 1e-3)] * columns + [(0, None)] * rows
    lower = linprog(cost, A_ub=A, b_ub=b, bounds=bounds)
    assert lower.fun == pytest.approx(own, rel=1e-3)
