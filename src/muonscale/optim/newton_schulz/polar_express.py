"""Polar Express schedules: each step is the best odd quintic for the result of the one before.

If the singular values are in [l, u], Remez exchange finds the quintic whose largest distance from 1
on that interval is smallest. It maps the interval to a narrower one around 1, for which the next
quintic is found.

References:
    Amsel et al., The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon
    Algorithm, arXiv 2505.16932.
"""

from __future__ import annotations

import math

import torch

from muonscale.errors import ConfigError

Triple = tuple[float, float, float]

PUBLISHED_CUSHION = 0.02407327424182761
"""Cushion of the table in the paper and in its repository."""
_NARROW = 5e-6
"""Relative width of an interval below which the minimax quintic is that of Newton-Schulz."""


def polar_express(
    steps: int,
    *,
    lower: float = 1e-3,
    cushion: float = PUBLISHED_CUSHION,
    safety: float = 1.0,
    safe_last: bool = False,
) -> tuple[Triple, ...]:
    """Return the `steps` triples of a Polar Express schedule.

    Args:
        steps: number of steps, at least 1.
        lower: smallest singular value that has to reach 1, in (0, 1). The largest is 1.
        cushion: lower bound of the ratio of the ends of the interval that a step is optimal on, in
            [0, 1). It limits the slope of the first steps.
        safety: s >= 1. Each step is `p(x / s)`, so that rounding beyond the upper end does no harm.
            The interval of the next step includes this division.
        safe_last: apply `safety` to the last step too.

    Raises:
        ConfigError: if a number is outside its range.

    References:
        Amsel et al., arXiv 2505.16932, algorithms 1 and 2.

    Examples:
        >>> [round(a, 4) for a, b, c in polar_express(3)]
        [8.2872, 4.1071, 3.9487]
    """
    for name, value, usable in [
        ("steps", steps, steps >= 1),
        ("lower", lower, 0 < lower < 1),
        ("cushion", cushion, 0 <= cushion < 1),
        ("safety", safety, safety >= 1),
    ]:
        if not usable:
            raise ConfigError(
                f"{name} is {value}: steps >= 1, 0 < lower < 1, 0 <= cushion < 1 and safety >= 1 "
                "are required"
            )
    triples: list[Triple] = []
    low, high = lower, 1.0
    for step in range(steps):
        a, b, c = triple = minimax_quintic(max(low, cushion * high), high)
        # Center the values at both ends around 1.
        factor = 2 / (_evaluate(triple, low) + _evaluate(triple, high))
        triple = a * factor, b * factor, c * factor
        if safe_last or step < steps - 1:
            triple = apply_safety(triple, safety)
        triples.append(triple)
        low = _evaluate(triple, low)
        high = 2 - low
    return tuple(triples)


def apply_safety(triple: Triple, safety: float) -> Triple:
    """Return the coefficients of `p(x / safety)`."""
    a, b, c = triple
    return a / safety, b / safety**3, c / safety**5


def minimax_quintic(low: float, high: float) -> Triple:
    """Return (a, b, c) of the odd quintic with the smallest largest distance from 1 on [low, high].

    At the optimum the errors at four points, both ends and the two extrema between them, have one
    size and alternating signs. Remez exchange moves the extrema until the size converges.
    """
    if low / high >= 1 - _NARROW:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner, outer = (3 * low + high) / 4, (low + 3 * high) / 4
    error = math.inf
    for _ in range(100):
        a, b, c, new_error = _equalize_errors(low, inner, outer, high)
        if abs(new_error - error) <= 1e-15:
            break
        error = new_error
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = math.sqrt((-3 * b - root) / (10 * c))
        outer = math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


def _equalize_errors(*points: float) -> tuple[float, float, float, float]:
    """Return (a, b, c, E) with p = 1 - E, 1 + E, 1 - E, 1 + E at the four points."""
    rows = [[x, x**3, x**5, (-1.0) ** n] for n, x in enumerate(points)]
    matrix = torch.tensor(rows, dtype=torch.float64, device="cpu")
    solved = torch.linalg.solve(matrix, torch.ones_like(matrix[0])).tolist()
    return solved[0], solved[1], solved[2], solved[3]


def _evaluate(triple: Triple, x: float) -> float:
    a, b, c = triple
    return a * x + b * x**3 + c * x**5
