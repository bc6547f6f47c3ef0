"""p-values of several tests that are looked at together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979): NaN stays NaN."""
    adjusted = [float("nan")] * len(p_values)
    order = sorted((p, n) for n, p in enumerate(p_values) if not np.isnan(p))
    largest = 0.0
    for rank, (p, number) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[number] = largest
    return adjusted
