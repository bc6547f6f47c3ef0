"""Where a fit of `E + sum_i A_i / x_i^a_i` starts: a search over the exponents alone.

With the exponents given, the law is linear in E and the A_i, which non-negative least squares finds
exactly. The search is therefore over one or two numbers instead of three or five, and well
conditioned where the direct one is not (the Hessian of five has condition numbers around 1e11).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy.optimize import nnls

from muonscale.lab.fits.result import FloatArray

EXPONENTS = (0.02, 2.0)
"""Of the first grid; the ones after it may leave it."""
GRID = 17
ZOOM = 5
"""Side of the grids that follow the first one, each half as wide as the one before."""
ROUNDS = 6


def search(log_sizes: Sequence[FloatArray], loss: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the best exponents `[k]`, and with them the terms E, A_1, ..., A_k.

    Args:
        log_sizes: log x_i of each point, `[n]` each. Centre them: A_i is the term where x_i = 1.
        loss: loss of each point; errors count relative to it.
    """
    axis = np.linspace(np.log(EXPONENTS[0]), np.log(EXPONENTS[1]), GRID)
    width, grids = axis[1] - axis[0], [axis] * len(log_sizes)
    best = np.empty(0)
    for _ in range(ROUNDS):
        tries = [np.exp(point) for point in product(*grids)]
        best = tries[int(np.argmin([_terms(log_sizes, loss, point)[1] for point in tries]))]
        grids = [np.log(value) + width * np.linspace(-1, 1, ZOOM) for value in best]
        width *= 2 / (ZOOM - 1)
    return best, _terms(log_sizes, loss, best)[0]


def _terms(
    log_sizes: Sequence[FloatArray], loss: FloatArray, exponents: FloatArray
) -> tuple[FloatArray, float]:
    """Return the best terms and the relative error that they leave."""
    powers = [np.exp(-e * log) for e, log in zip(exponents, log_sizes, strict=True)]
    columns = np.stack([np.ones_like(loss), *powers], axis=1)
    return nnls(columns / loss[:, None], np.ones_like(loss))
