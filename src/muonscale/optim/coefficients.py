"""Newton-Schulz polynomials: which odd quintic is applied at which step, and where it comes from.

A *triple* `(a, b, c)` is the polynomial `p(s) = a*s + b*s^3 + c*s^5`, applied to every singular
value at once by `X <- a*X + (b*A + c*A@A) @ X` with `A = X @ X.T`. A *schedule* is one triple per
step. Where more steps are asked for than a schedule has, its last triple is repeated; where fewer,
its first triples are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muonscale.errors import ConfigError, nearest

Triple = tuple[float, float, float]
"""Coefficients `(a, b, c)` of one odd quintic."""

CoefficientsLike = str | Triple | Sequence[Sequence[float]]
"""A row of the table by name, one triple for every step, or one triple per step."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One triple per step, with its source."""

    triples: tuple[Triple, ...]
    """Applied in this order; the last is repeated as often as needed."""
    source: str
    """Author, title and place of the numbers."""


SCHEDULES: dict[str, Schedule] = {
    "jordan": Schedule(
        triples=((3.4445, -4.7750, 2.0315),),
        source="Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024), "
        "section 'Tuning the coefficients'; Liu et al., Muon is Scalable for LLM Training, "
        "arXiv 2502.16982, equation 2",
    ),
}


def resolve_triples(coefficients: CoefficientsLike, steps: int) -> tuple[Triple, ...]:
    """Return the `steps` triples that `coefficients` stands for.

    Args:
        coefficients: name of a row of `SCHEDULES`, one triple, or a sequence of triples.
        steps: number of Newton-Schulz steps, at least 1.

    Returns:
        `steps` triples, in the order in which they are applied.

    Raises:
        ConfigError: for an unknown name, a triple that is not three numbers, or `steps < 1`.

    Example:
        >>> resolve_triples("jordan", 2)
        ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    if steps < 1:
        raise ConfigError(f"ns_steps is {steps}: at least one Newton-Schulz step is needed")
    triples = _triples(coefficients)
    return tuple(triples[min(step, len(triples) - 1)] for step in range(steps))


def _triples(coefficients: CoefficientsLike) -> tuple[Triple, ...]:
    if isinstance(coefficients, str):
        if coefficients not in SCHEDULES:
            hint = nearest(coefficients, SCHEDULES)
            raise ConfigError(f"no Newton-Schulz coefficients are called {coefficients!r}: {hint}")
        return SCHEDULES[coefficients].triples
    if len(coefficients) == 3 and all(isinstance(c, (int, float)) for c in coefficients):
        return (_triple(coefficients),)
    if len(coefficients) == 0:
        raise ConfigError("ns_coefficients is empty: give a name, a triple or a list of triples")
    return tuple(_triple(triple) for triple in coefficients)


def _triple(numbers: object) -> Triple:
    if not isinstance(numbers, Sequence) or len(numbers) != 3:
        raise ConfigError(
            f"ns_coefficients has {numbers!r}: a triple of numbers (a, b, c) goes there"
        )
    a, b, c = (float(number) for number in numbers)
    return a, b, c
