"""The start of a fit of `E + sum_i A_i / x_i^a_i`: a search over the exponents alone.

With the exponents given, the law is linear in E and the A_i, and non-negative least squares finds
these exactly. The search is therefore over one or two numbers instead of three or five, and well
conditioned where the direct search is not (the Hessian of five has condition numbers around 1e11).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy.optimize import nnls

from muonscale.lab.fits.result import FloatArray

FIRST_GRID = (0.02, 2.0)
"""Exponents of the first grid; later grids may leave this range."""
GRID = 17
ZOOM = 5
"""Side of the grids after the first one, each half as wide as the one before."""
ROUNDS = 6
NOTHING = 1e-9
"""A part of the loss that is rounding."""


def search_exponents(
    log_sizes: Sequence[FloatArray], loss: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the best exponents `[k]`, and with them the terms E, A_1, ..., A_k.

    Args:
        log_sizes: log x_i of each point, `[n]` each. Center them: A_i is the term where x_i = 1.
        loss: loss of each point; errors are relative to it.
    """

    def solve(exponents: FloatArray) -> tuple[FloatArray, float]:
        """Return the best terms and the relative error that they leave."""
        powers = [np.exp(-e * log) for e, log in zip(exponents, log_sizes, strict=True)]
        columns = np.stack([np.ones_like(loss), *powers], axis=1)
        return nnls(columns / loss[:, None], np.ones_like(loss))

    axis = np.linspace(np.log(FIRST_GRID[0]), np.log(FIRST_GRID[1]), GRID)
    width, grids = axis[1] - axis[0], [axis] * len(log_sizes)
    best = np.empty(0)
    for _ in range(ROUNDS):
        tries = [np.exp(point) for point in product(*grids)]
        best = tries[int(np.argmin([solve(point)[1] for point in tries]))]
        grids = [np.log(value) + width * np.linspace(-1, 1, ZOOM) for value in best]
        width *= 2 / (ZOOM - 1)
    return best, solve(best)[0]
