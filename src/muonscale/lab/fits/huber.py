"""Huber's loss of the residuals of a law, and its minimum by L-BFGS in whitened coordinates.

The parameters of a scaling law are so correlated that L-BFGS stops far from the minimum in their own
coordinates. In `z` with `theta = start + W z`, where `W W^T` is the inverse of the Gauss-Newton
matrix at the start, the objective is nearly round, and some tens of steps reach rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import eigh
from scipy.optimize import minimize

from muonscale.lab.fits.result import FloatArray
from muonscale.lab.fits.status import FitStatus

Model = Callable[[FloatArray], tuple[FloatArray, FloatArray]]
"""From parameters `[p]` to log predictions `[n]` and their Jacobian `[n, p]`."""

ITERATIONS = 500
LEAST_EIGENVALUE = 1e-13
GRADIENT = 1e-9
"""Largest component of the whitened gradient where a fit ends."""
REFIT_GRADIENT = 1e-4
"""Where the refit to a resample ends, and a search that gives up counts as one at the minimum."""


def objective(
    model: Model, theta: FloatArray, target: FloatArray, counts: FloatArray, delta: float
) -> tuple[float, FloatArray]:
    """Return the sum of Huber's losses over `delta**2`, and its gradient `[p]`.

    Args:
        model: predictions and Jacobian.
        theta: parameters, `[p]`.
        target: what the predictions should be, `[n]`.
        counts: how often each point counts, `[n]`.
        delta: residual at which the loss turns from quadratic to linear.
    """
    predicted, jacobian = model(theta)
    scaled = (predicted - target) / delta
    size = np.abs(scaled)
    value = np.where(size <= 1, 0.5 * scaled**2, size - 0.5)
    slope = counts * np.clip(scaled, -1, 1) / delta
    return float(counts @ value), slope @ jacobian


def whitening(model: Model, theta: FloatArray, delta: float) -> FloatArray:
    """Return W `[p, p]` with `W W^T` the inverse of the Gauss-Newton matrix `J^T J / delta**2`.

    A step of length one along any axis of `z` changes the predictions by about `delta` together.
    """
    _, jacobian = model(theta)
    scale = delta / np.sqrt((jacobian**2).sum(axis=0))
    values, vectors = eigh((jacobian * scale).T @ (jacobian * scale) / delta**2)
    # Directions that the points hardly tell would get a step without bound.
    return scale[:, None] * vectors / np.sqrt(np.maximum(values, LEAST_EIGENVALUE * values[-1]))


def polish(
    model: Model,
    start: FloatArray,
    target: FloatArray,
    counts: FloatArray,
    delta: float,
    basis: FloatArray | None = None,
    gradient: float = GRADIENT,
) -> tuple[FloatArray, FitStatus]:
    """Return the parameters at the minimum next to `start`, and how the search ended.

    Args:
        model: predictions and Jacobian.
        start: parameters to start from, `[p]`.
        target: what the predictions should be, `[n]`.
        counts: how often each point counts, `[n]`.
        delta: residual at which the loss turns from quadratic to linear.
        basis: a matrix from `whitening`; made at the start when not given.
        gradient: largest component of the whitened gradient at the end.
    """
    W = whitening(model, start, delta) if basis is None else basis

    def whitened(z: FloatArray) -> tuple[float, FloatArray]:
        value, slope = objective(model, start + W @ z, target, counts, delta)
        return value, slope @ W

    found = minimize(
        whitened,
        np.zeros(len(start)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": ITERATIONS, "maxfun": 10 * ITERATIONS, "ftol": 0.0, "gtol": gradient},
    )
    return start + W @ found.x, _status(found.status, float(np.abs(found.jac).max()))


def _status(code: int, gradient: float) -> FitStatus:
    if code == 0 or gradient <= REFIT_GRADIENT:
        return FitStatus.CONVERGED
    return FitStatus.MAX_ITERATIONS if code == 1 else FitStatus.ABNORMAL
