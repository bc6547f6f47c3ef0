"""The best N and D for a number of FLOPs, by a fitted `L = E + A/N^alpha + B/D^beta` (C = 6 N D).

Hoffmann et al., arXiv 2203.15556, equation 4. All are functions of parameters `[..., 5]` (log A,
log B, log E, alpha, beta), so that they take the draws of a bootstrap as well as a fit.
"""

from __future__ import annotations

import numpy as np

from muonscale.lab.fits.result import FloatArray

FLOPS = 6
"""Per parameter and token, forward and backward."""
LEAST_EXPONENT = 1e-6
"""Smaller exponents are replaced by this one."""


def log_parameters(theta: FloatArray, flops: float) -> FloatArray:
    """Return log N with the lowest loss for these FLOPs, `[...]`."""
    alpha, beta = _clip_exponents(theta)
    return _log_g(theta) + beta / (alpha + beta) * np.log(flops / FLOPS)


def log_tokens(theta: FloatArray, flops: float) -> FloatArray:
    """Return log D with the lowest loss for these FLOPs, `[...]`."""
    return np.log(flops / FLOPS) - log_parameters(theta, flops)


def log_best_loss(theta: FloatArray, flops: float) -> FloatArray:
    """Return the log of the lowest loss for these FLOPs, `[...]`."""
    falling, exponent = _frontier(theta)
    return np.logaddexp(theta[..., 2], falling - exponent * np.log(flops / FLOPS))


def log_reach(theta: FloatArray, log_loss: float | FloatArray) -> FloatArray:
    """Return the log of the fewest FLOPs to a log loss, `[...]`; infinite at E or below."""
    falling, exponent = _frontier(theta)
    above = np.exp(log_loss) - np.exp(theta[..., 2])
    reached = above > 0
    log_above = np.log(np.where(reached, above, 1))
    return np.where(reached, np.log(FLOPS) + (falling - log_above) / exponent, np.inf)


def _frontier(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return log K and g of the lowest loss, `E + K (C/6)^-g`."""
    alpha, beta = _clip_exponents(theta)
    log_g = _log_g(theta)
    falling = np.logaddexp(theta[..., 0] - alpha * log_g, theta[..., 1] + beta * log_g)
    return falling, alpha * beta / (alpha + beta)


def _log_g(theta: FloatArray) -> FloatArray:
    """Return log N of the best model at N D = 1."""
    alpha, beta = _clip_exponents(theta)
    ratio = np.log(alpha) + theta[..., 0] - np.log(beta) - theta[..., 1]
    return ratio / (alpha + beta)


def _clip_exponents(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return alpha and beta, which are nearly zero in a resample whose loss does not fall."""
    return np.maximum(theta[..., 3], LEAST_EXPONENT), np.maximum(theta[..., 4], LEAST_EXPONENT)
