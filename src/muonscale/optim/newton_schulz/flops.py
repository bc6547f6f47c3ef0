"""The cost of Newton-Schulz in floating-point operations, and the form that follows from it.

Let S be the shorter side and L the longer one. The direct form multiplies with X twice per step.
The Gram form does so twice per segment, but needs more S x S products per step. Few segments are
therefore cheapest for long matrices, and the direct form for square ones. Every step multiplies the
rounding errors of a segment's Gram matrix by up to `a^2`, which limits the length of a segment.
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
from muonscale.optim.newton_schulz.kernels import rows_of_panel
from muonscale.optim.newton_schulz.kernels.cpu import symmetric_flops

Segments = tuple[int, ...]
"""Number of steps between two restarts, in order; see `newton_schulz_`."""

FORMS = ("auto", "direct", "gram")
"""How the polynomial is evaluated; see `choose_segments`."""

STEEPEST_SEGMENT = 50.0
"""Largest slope at 0 of a segment's polynomial in 32 bits and fewer. The square of the slope
multiplies the rounding errors of the Gram matrix. Up to this slope the error is about that of the
direct form in all of these dtypes. Measured: EXPERIMENTS.md, "How long a Gram segment may be"."""

STEEPEST_IN_FLOAT64 = 2000.0
"""The same in float64: 2000^2 * 1.1e-16 is 4e-10."""

LARGEST_BELOW_ZERO = 0.84
"""How far below zero rounding may push the eigenvalues of a segment's Gram matrix, because the next
polynomial diverges there: slope^2 * rounding / sqrt(short side). The root is there because the
rounding of n x n entries is spread over n directions. At 1.6, updates of 8 and 16 rows were
hundreds of times too long in bfloat16. Measured: EXPERIMENTS.md, "Small matrices in bfloat16"."""

HIGHEST_IN_16_BITS = 1.5
"""In 16 bits, "auto" uses the direct form if a step may return more than this. The next polynomial
diverges close to such values, and the Gram matrix is rounded too coarsely. Same measurement."""


def choose_segments(
    shape: Sequence[int],
    coefficients: Coefficients,
    form: str = "auto",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kernel: str = "auto",
) -> Segments:
    """Return the segments (see `newton_schulz_`) for matrices of `shape` = [..., out, in].

    "direct" is one step per segment. "gram" restarts after the steps in `coefficients.restarts`. If
    that is None, it restarts as rarely as the rounding of `dtype` allows. "auto" is the one of the
    two with fewer operations, but "direct" in 16 bits for polynomials that need more precision.

    Raises:
        ConfigError: if the form is unknown, or a restart is not before the last step.
    """
    candidates = accepted_segments(coefficients, form, dtype, min(shape[-2:]))
    panel = rows_of_panel(min(shape[-2:]), dtype, device, kernel)
    return min(candidates, key=lambda s: segment_flops(shape, coefficients.triples, s, panel))


def accepted_segments(
    coefficients: Coefficients, form: str, dtype: torch.dtype, short: int
) -> tuple[Segments, ...]:
    """Return the candidates that `choose_segments` chooses from, for a short side.

    Raises:
        ConfigError: as for `choose_segments`.
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
    """Return the segments of the Gram form: by `coefficients.restarts`, or as few as possible.

    Args:
        coefficients: coefficients of all steps.
        dtype: dtype of the products.
        short: short side of the matrices.
    """
    steps = coefficients.steps
    if coefficients.restarts is None:
        steepest = STEEPEST_SEGMENT if dtype.itemsize <= 4 else STEEPEST_IN_FLOAT64
        rounding = torch.finfo(dtype).eps / 2
        safe = math.sqrt(LARGEST_BELOW_ZERO * math.sqrt(max(short, 1)) / rounding)
        lengths: list[int] = []
        slope = 1.0
        for a, _, _ in coefficients.triples:
            slope *= abs(a)
            if lengths and slope <= min(steepest, safe):
                lengths[-1] += 1
            else:
                lengths.append(1)
                slope = abs(a)
        return tuple(lengths)
    stops = sorted({*coefficients.restarts, steps})
    if stops[-1] > steps or steps in coefficients.restarts:
        raise ConfigError(
            f"restarts are {coefficients.restarts}: with {steps} steps, they must be between 1 and "
            f"{steps - 1}"
        )
    return tuple(stop - start for start, stop in zip([0, *stops], stops, strict=False))


@functools.cache
def highest_value(triples: tuple[Triple, ...]) -> float:
    """Return the largest magnitude of a singular value in [0, 1] after any step but the last."""
    values = torch.linspace(0, 1, 2001, dtype=torch.float64, device="cpu")
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
    kernel: str = "auto",
) -> int:
    """Return the floating-point operations that `orthogonalize` spends on `[..., out, in]`.

    Let S be the short side and L the long one. A product costs 2*S*S*S or 2*S*S*L per matrix, or
    little more than half of that if it is symmetric and computed by panels (`kernels.cpu`). A
    segment of k steps has one symmetric product X @ X.T, 4*k - 3 symmetric S x S products, and one
    product with X. The direct form has one step per segment. Elementwise work is not counted.

    Args:
        shape: [..., out, in].
        steps: number of steps.
        form: see `choose_segments`.
        coefficients: as for `resolve`. A step with c = 0 saves a product.
        dtype: dtype of the products.
        device: device of the products; only a CPU uses panels.
        kernel: as for `orthogonalize`; a tile of the Triton kernel counts as a panel.

    Raises:
        ConfigError: as for `resolve` and `choose_segments`.

    Examples:
        >>> ns_flops((2, 3), 1, "direct")
        64
    """
    resolved = resolve(coefficients, steps)
    segments = choose_segments(shape, resolved, form, dtype=dtype, device=device, kernel=kernel)
    panel = rows_of_panel(min(shape[-2:]), dtype, device, kernel)
    return segment_flops(shape, resolved.triples, segments, panel)


def segment_flops(
    shape: Sequence[int], triples: Sequence[Triple], segments: Segments, panel: int
) -> int:
    """Return the operations of `segments` on `[..., out, in]` with panels of `panel` rows."""
    *leading, rows, columns = shape
    short, long = min(rows, columns), max(rows, columns)
    ends = symmetric_flops(short, long, panel) + 2 * short * short * long
    squares = count_squares(triples, segments) * symmetric_flops(short, short, panel)
    return math.prod(leading) * (len(segments) * ends + squares)


def count_squares(triples: Sequence[Triple], segments: Segments) -> int:
    """Return the number of S x S products of `newton_schulz_`.

    Each step computes A @ A, unless c = 0. Each step but the first of a segment computes Q @ Z, and
    each step but the last computes two products for the next A.
    """
    return sum(c != 0 for _, _, c in triples) + sum(3 * (length - 1) for length in segments)
