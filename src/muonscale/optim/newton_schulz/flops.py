"""What Newton-Schulz costs, in floating-point operations, and which form is taken because of it.

The Gram form works on S x S matrices, where S is the shorter side, and touches the longer side L
twice per segment instead of twice per step; each step costs it more S x S products, of which
some are saved at the ends of a segment. Hence long matrices want few segments, square ones the
direct form. A segment must not be so long that rounding in its Gram matrix, which every step
multiplies by up to `a^2`, reaches the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from muonscale.errors import ConfigError, nearest
from muonscale.optim.newton_schulz.coefficients import (
    Coefficients,
    CoefficientsLike,
    Triple,
    resolve,
)
from muonscale.optim.newton_schulz.kernels.cpu import panel_rows, symmetric_flops

Segments = tuple[int, ...]
"""Number of steps between two restarts, in order; see `muonscale.optim.newton_schulz.orthogonalize.newton_schulz_`."""

FORMS = ("auto", "direct", "gram")
"""How the polynomial is evaluated; see `choose_segments`."""

STEEPEST_SEGMENT = 50.0
"""Largest slope at 0 of a segment's polynomial in 32 bits and fewer. Rounding in its Gram matrix
reaches the result multiplied by the square of it; up to here the error is about that of the direct
form, in every one of these dtypes. Measured: EXPERIMENTS.md, "How long a Gram segment may be"."""

STEEPEST_IN_FLOAT64 = 2000.0
"""The same in float64, where there is rounding to spare: 2000^2 * 1.1e-16 is 4e-10."""

LARGEST_BELOW_ZERO = 0.84
"""How far rounding may push the eigenvalues of a segment's Gram matrix below zero, where the next
polynomial diverges: slope^2 * rounding / sqrt(short side), the rounding of n x n entries being spread
over n directions. At 1.6 updates of 8 and 16 rows came out hundreds of times too long in bfloat16.
Measured: EXPERIMENTS.md, "Small matrices in bfloat16"."""

HIGHEST_IN_16_BITS = 1.5
"""Values of a step beyond which "auto" keeps to the direct form in 16 bits: such steps end close to
where the next polynomial diverges, and the Gram matrix is rounded too coarsely for that. Measured
likewise."""


def choose_segments(
    shape: Sequence[int],
    coefficients: Coefficients,
    form: str = "auto",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Segments:
    """Return the segments (see `muonscale.optim.newton_schulz.orthogonalize`) for matrices of `shape` = [..., out, in].

    "direct" is one step per segment. "gram" restarts after the steps in `coefficients.restarts`,
    or, where that is None, as seldom as the rounding of `dtype` allows. "auto" is the one of the
    two with fewer operations, or "direct" in 16 bits for polynomials that need more precision.

    Raises:
        ConfigError: for an unknown form, or a restart at or after the last step.
    """
    ways = accepted_segments(coefficients, form, dtype, min(shape[-2:]))
    panel = panel_rows(min(shape[-2:]), dtype, device)
    return min(ways, key=lambda s: segment_flops(shape, coefficients.triples, s, panel))


def accepted_segments(
    coefficients: Coefficients, form: str, dtype: torch.dtype, short: int
) -> tuple[Segments, ...]:
    """Return the segments that `choose_segments` takes the cheapest of, for a short side.

    Raises:
        ConfigError: as there.
    """
    direct = (1,) * coefficients.steps
    if form == "direct":
        return (direct,)
    if form not in FORMS:
        raise ConfigError(f"no form is called {form!r}: {nearest(form, FORMS)}")
    gram = gram_segments(coefficients, dtype, short)
    if form == "gram":
        return (gram,)
    if dtype.itemsize < 4 and highest_value(coefficients.triples) > HIGHEST_IN_16_BITS:
        return (direct,)
    return gram, direct


def gram_segments(coefficients: Coefficients, dtype: torch.dtype, short: int) -> Segments:
    """Return the segments of the Gram form with the restarts of `coefficients`, or the fewest.

    Args:
        coefficients: of all steps.
        dtype: of the products.
        short: the short side of the matrices.
    """
    steps = coefficients.steps
    if coefficients.restarts is None:
        steepest = STEEPEST_SEGMENT if dtype.itemsize <= 4 else STEEPEST_IN_FLOAT64
        rounding = torch.finfo(dtype).eps / 2
        safe = math.sqrt(LARGEST_BELOW_ZERO * math.sqrt(max(short, 1)) / rounding)
        return _longest_segments(coefficients.triples, min(steepest, safe))
    stops = sorted({*coefficients.restarts, steps})
    if stops[-1] > steps or steps in coefficients.restarts:
        raise ConfigError(
            f"restarts are {coefficients.restarts}: with {steps} steps, 1 to {steps - 1} are "
            "accepted"
        )
    return tuple(stop - start for start, stop in zip([0, *stops], stops, strict=False))


def _longest_segments(triples: Sequence[Triple], steepest: float) -> Segments:
    lengths: list[int] = []
    slope = 1.0
    for a, _, _ in triples:
        slope *= abs(a)
        if lengths and slope <= steepest:
            lengths[-1] += 1
        else:
            lengths.append(1)
            slope = abs(a)
    return tuple(lengths)


@functools.cache
def highest_value(triples: tuple[Triple, ...]) -> float:
    """Return the largest magnitude that any step but the last leaves of a singular value in [0, 1]."""
    values = torch.linspace(0, 1, 2001, dtype=torch.float64)
    highest = 1.0
    for a, b, c in triples[:-1]:
        values = a * values + b * values**3 + c * values**5
        highest = max(highest, float(values.abs().max()))
    return highest


def ns_flops(
    shape: Sequence[int],
    steps: int = 5,
    form: str = "auto",
    *,
    coefficients: CoefficientsLike = "jordan",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> int:
    """Return the floating-point operations that `orthogonalize` spends on `[..., out, in]`.

    Per matrix with short side S and long side L, a product costs 2*S*S*S or 2*S*S*L, or little more
    than half of that where it is symmetric and computed by panels (`muonscale.optim.newton_schulz.kernels.cpu`).
    A segment of k steps forms X @ X.T once (symmetric), 4*k - 3 symmetric S x S products, and one
    product with X; the direct form is `steps` segments of one. Elementwise work is not counted.

    Args:
        shape: [..., out, in].
        steps: number of steps.
        form: "direct", "gram", or "auto": the cheaper.
        coefficients: those with c = 0 save a product per step; their slopes and the dtype decide
            about restarts.
        dtype: of the products.
        device: panels are used on a CPU only.

    Raises:
        ConfigError: as `resolve` and `choose_segments`.

    Example:
        >>> ns_flops((2, 3), 1, "direct")
        64
    """
    resolved = resolve(coefficients, steps)
    segments = choose_segments(shape, resolved, form, dtype=dtype, device=device)
    panel = panel_rows(min(shape[-2:]), dtype, device)
    return segment_flops(shape, resolved.triples, segments, panel)


def segment_flops(
    shape: Sequence[int], triples: Sequence[Triple], segments: Segments, panel: int
) -> int:
    """Return the operations of `segments` on `[..., out, in]` with panels of `panel` rows."""
    *leading, rows, columns = shape
    short, long = min(rows, columns), max(rows, columns)
    ends = symmetric_flops(short, long, panel) + 2 * short * short * long
    squares = 0
    first = 0
    for length in segments:
        # Per step: R @ R, unless c = 0; but for the first, Q @ Z; but for the last, R @ Z and @ Z.
        squares += sum(1 for _, _, c in triples[first : first + length] if c != 0)
        squares += 3 * (length - 1)
        first += length
    square = symmetric_flops(short, short, panel)
    return math.prod(leading) * (len(segments) * ends + squares * square)
