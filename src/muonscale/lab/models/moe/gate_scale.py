"""The factor that gives the weighted sum of k experts the RMS of a single expert."""

from __future__ import annotations

import numpy as np

from muonscale.errors import ConfigError

DRAWS = 20_000
"""Samples of `gate_scale`; over 20 seeds its standard deviation is below 1e-4 from 8 experts on."""


def gate_scale(experts: int, k: int) -> float:
    """Return the factor that gives k gated experts the RMS that one expert's output has.

        mean of 1 / sqrt(sum p^2),   p = top-k of sigmoid(z), divided by their sum,   z ~ N(0, 1)^E

    It assumes that the outputs of experts are uncorrelated, so that weights p scale the RMS of
    their sum by sqrt(sum p^2). It is the `routed_scaling_factor` of a mixture with sigmoid gates.
    The seed is fixed: the same arguments give the same number.

    Args:
        experts: routed experts E.
        k: experts per token, 1 to E.

    Raises:
        ConfigError: if k is not within 1 and E.

    References:
        Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, appendix C, figure 6.

    Examples:
        >>> round(gate_scale(64, 6), 3)
        2.446
    """
    if not 1 <= k <= experts:
        raise ConfigError(
            f"gate_scale: k={k} is not between 1 and the number of experts, {experts}"
        )
    logits = np.random.default_rng(0).standard_normal((DRAWS, experts))
    chosen = np.partition(logits, experts - k, axis=1)[:, experts - k :]
    p = 1 / (1 + np.exp(-chosen))
    p /= p.sum(axis=1, keepdims=True)
    return float((1 / np.sqrt((p**2).sum(axis=1))).mean())
