"""The token-optimal batch: the largest batch size that reaches a loss with the fewest tokens.

Practical Efficiency of Muon, arXiv 2505.02222, section 3.2: `B_tok = max{B : T(B) = min T}`. It is
one of the batch sizes that were measured. Where T is nearly flat it jumps from one to another; with
a tolerance, batches whose tokens are a little more than the least count too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import CONFIDENCE, Draws, Seed
from muonscale.lab.fits.result import ROUNDING, FloatArray
from muonscale.lab.fits.steps_to_loss import StepsToLoss


def find_token_optimal(
    batches: ArrayLike, log_tokens: FloatArray, tolerance: float = 0.0
) -> FloatArray:
    """Return the largest batch size whose tokens are within `tolerance` of the least, `[...]`.

    Args:
        batches: B, rising, `[b]`.
        log_tokens: log T of one table or of several, `[..., b]`; infinite where the loss was not
            reached. The result is NaN for a table in which it never was.
        tolerance: 0.2 for at most 20 % more tokens than the least.

    Raises:
        StudyError: for a tolerance below zero.
    """
    if tolerance < 0:
        raise StudyError(f"tolerance={tolerance:g}: it must be 0 or more")
    least = log_tokens.min(axis=-1, keepdims=True)
    near = log_tokens <= least + np.log1p(tolerance) + ROUNDING
    largest = np.where(near, np.asarray(batches, np.float64), 0).max(axis=-1)
    return np.where(np.isfinite(least[..., 0]), largest, np.nan)


def draw_token_optimal(
    steps: StepsToLoss,
    tolerance: float = 0.0,
    resamples: int = 1000,
    seed: Seed = 0,
    level: float = CONFIDENCE,
) -> Draws:
    """Return the token-optimal batch, `[1]`, and those of tables that might have been measured.

    Raises:
        StudyError: for a tolerance below zero, if the noise of seeds is not known, or for too few
            resamples.
    """
    best = find_token_optimal(steps.batches, steps.log_tokens, tolerance)
    tables = steps.draw(resamples, seed, level) + np.log(steps.batches)
    samples = find_token_optimal(steps.batches, tables, tolerance)
    return Draws(np.atleast_1d(best), samples[:, None], level)
