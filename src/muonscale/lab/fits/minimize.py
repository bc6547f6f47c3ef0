"""The two searches of the fits: least squares of logarithms, and Huber's loss.

Least squares of a law of two or three parameters use MINPACK's Levenberg-Marquardt.

The five parameters of the law of N and D are so correlated that L-BFGS stops far from the minimum
in their own coordinates. In `z` with `theta = start + W z`, where `W W^T` is the inverse of the
Gauss-Newton matrix at the start, the objective is nearly round, and some tens of steps reach
rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import eigh
from scipy.optimize import least_squares, minimize

from muonscale.lab.fits.result import FitStatus, FloatArray

Model = Callable[[FloatArray], tuple[FloatArray, FloatArray]]
"""Maps parameters `[p]` to log predictions `[n]` and their Jacobian `[n, p]`."""

EVALUATIONS = 2000
TOLERANCE = 1e-14
ITERATIONS = 500
LEAST_EIGENVALUE = 1e-13
GRADIENT = 1e-9
"""Largest component of the whitened gradient at which a fit ends."""
REFIT_GRADIENT = 1e-4
"""Where the refit to a resample ends. A search that gives up below it counts as converged."""


def minimize_squares(
    model: Model, start: FloatArray, target: FloatArray
) -> tuple[FloatArray, FitStatus]:
    """Return the parameters `[p]` with the least squares next to `start`, and the status.

    Args:
        model: log predictions `[n]` and their Jacobian `[n, p]`.
        start: parameters to start from.
        target: logarithms of the measurements, `[n]`.
    """
    result = least_squares(
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
    return result.x, FitStatus.CONVERGED if result.status > 0 else FitStatus.MAX_ITERATIONS


def sum_huber(
    model: Model, theta: FloatArray, target: FloatArray, counts: FloatArray, delta: float
) -> tuple[float, FloatArray]:
    """Return the sum of Huber's losses over `delta**2`, and its gradient `[p]`.

    Args:
        model: predictions and Jacobian.
        theta: parameters, `[p]`.
        target: logarithms of the measurements, `[n]`.
        counts: how often each point counts, `[n]`.
        delta: residual at which the loss turns from quadratic to linear.
    """
    predicted, jacobian = model(theta)
    scaled = (predicted - target) / delta
    size = np.abs(scaled)
    value = np.where(size <= 1, 0.5 * scaled**2, size - 0.5)
    slope = counts * np.clip(scaled, -1, 1) / delta
    return float(counts @ value), slope @ jacobian


def whiten(model: Model, theta: FloatArray, delta: float) -> FloatArray:
    """Return W `[p, p]` with `W W^T` the inverse of the Gauss-Newton matrix `J^T J / delta**2`.

    A step of length one along any axis of `z` changes the predictions by about `delta` in total.
    """
    _, jacobian = model(theta)
    scale = delta / np.sqrt((jacobian**2).sum(axis=0))
    values, vectors = eigh((jacobian * scale).T @ (jacobian * scale) / delta**2)
    # Directions that the points hardly determine would get a step without bound.
    return scale[:, None] * vectors / np.sqrt(np.maximum(values, LEAST_EIGENVALUE * values[-1]))


def minimize_huber(
    model: Model,
    start: FloatArray,
    target: FloatArray,
    counts: FloatArray,
    delta: float,
    basis: FloatArray | None = None,
    gradient: float = GRADIENT,
) -> tuple[FloatArray, FitStatus]:
    """Return the parameters with the least Huber loss next to `start`, and the status.

    Args:
        model: predictions and Jacobian.
        start: parameters to start from, `[p]`.
        target: logarithms of the measurements, `[n]`.
        counts: how often each point counts, `[n]`.
        delta: residual at which the loss turns from quadratic to linear.
        basis: a matrix from `whiten`; computed at the start if None.
        gradient: largest component of the whitened gradient at the end.
    """
    W = whiten(model, start, delta) if basis is None else basis

    def whitened(z: FloatArray) -> tuple[float, FloatArray]:
        value, slope = sum_huber(model, start + W @ z, target, counts, delta)
        return value, slope @ W

    result = minimize(
        whitened,
        np.zeros(len(start)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": ITERATIONS, "maxfun": 10 * ITERATIONS, "ftol": 0.0, "gtol": gradient},
    )
    if result.status == 0 or float(np.abs(result.jac).max()) <= REFIT_GRADIENT:
        status = FitStatus.CONVERGED
    else:
        status = FitStatus.MAX_ITERATIONS if result.status == 1 else FitStatus.ABNORMAL
    return start + W @ result.x, status
