"""Least squares of log residuals for laws of two or three parameters, by MINPACK's Levenberg-Marquardt."""

from __future__ import annotations

import numpy as np
from scipy.optimize import least_squares

from muonscale.lab.fits.bootstrap import LEVEL, Draws, Seed, noise_tables, residual_tables
from muonscale.lab.fits.huber import Model
from muonscale.lab.fits.result import FloatArray
from muonscale.lab.fits.status import FitStatus

EVALUATIONS = 2000
TOLERANCE = 1e-14


def least_squares_of_logs(
    model: Model, start: FloatArray, target: FloatArray
) -> tuple[FloatArray, FitStatus]:
    """Return the parameters `[p]` at the minimum next to `start`, and how the search ended.

    Args:
        model: log predictions `[n]` and their Jacobian `[n, p]`.
        start: parameters to start from.
        target: logarithms of what was measured, `[n]`.
    """
    found = least_squares(
        lambda theta: model(theta)[0] - target,
        start,
        jac=lambda theta: model(theta)[1],
        method="lm",
        x_scale="jac",
        ftol=TOLERANCE,
        xtol=TOLERANCE,
        gtol=TOLERANCE,
        max_nfev=EVALUATIONS,
    )
    return found.x, FitStatus.CONVERGED if found.status > 0 else FitStatus.MAX_ITERATIONS


def draw_log_squares(
    model: Model,
    theta: FloatArray,
    target: FloatArray,
    resamples: int,
    seed: Seed,
    level: float = LEVEL,
    noise: float | None = None,
) -> Draws:
    """Refit to tables that might have been measured instead, each from `theta`.

    Args:
        model: log predictions and their Jacobian.
        theta: parameters of the fit, `[p]`.
        target: logarithms of what was measured, `[n]`.
        resamples: number of tables.
        seed: of the draw; several numbers for one of several laws that are compared.
        level: of the intervals.
        noise: standard deviation of a log measurement, when it is known; else residuals are drawn.

    Raises:
        StudyError: for too few points or resamples for an interval.
    """
    fitted, jacobian = model(theta)
    generator = np.random.default_rng(seed)
    if noise is None:
        residuals = target - fitted
        tables = residual_tables(fitted, residuals, jacobian, resamples, generator, level)
    else:
        tables = noise_tables(fitted, noise, resamples, generator)
    refits = [least_squares_of_logs(model, theta, table) for table in tables]
    failed = sum(status is not FitStatus.CONVERGED for _, status in refits)
    return Draws(theta, np.stack([found for found, _ in refits]), level, failed)
