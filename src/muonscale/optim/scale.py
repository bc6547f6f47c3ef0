"""Shape factors: what the polar factor is multiplied by, given the shape of its matrix.

An exact polar factor of an `(out, in)` matrix of full rank has RMS `1/sqrt(max(out, in))`
(Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, lemma 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from muonscale.errors import ConfigError, nearest

ScaleLike = str | Callable[[int, int], float]
"""Name of a shape factor, or a function of (out, in)."""

SCALES: tuple[str, ...] = ("rms", "spectral", "keller", "none")
"""The names that `shape_factor` knows."""


def shape_factor(scale: ScaleLike, shape: tuple[int, int], rms: float) -> float:
    """Return the factor for a logical matrix of `shape` = (out, in).

    | scale    | factor                  | source                                            |
    |----------|-------------------------|---------------------------------------------------|
    | rms      | rms*sqrt(max(out, in))  | arXiv 2502.16982, equation 4 (there rms is 0.2)   |
    | spectral | sqrt(out/in)            | Yang et al., A Spectral Condition for Feature     |
    |          |                         | Learning, arXiv 2310.17813, condition 1           |
    | keller   | sqrt(max(1, out/in))    | Jordan et al., Muon (2024), reference code        |
    | none     | 1                       |                                                   |
    | callable | scale(out, in)          |                                                   |

    Args:
        scale: one of the names above, or a function of (out, in).
        shape: (out, in) of the logical matrix, not of the stored parameter.
        rms: RMS that the scaled update is to have; used by "rms" alone.

    Raises:
        ConfigError: for an unknown name.

    Example:
        >>> round(shape_factor("rms", (64, 256), 0.2), 6)
        3.2
    """
    out, in_ = shape
    if callable(scale):
        return float(scale(out, in_))
    if 0 in shape:
        return 0.0
    match scale:
        case "rms":
            return rms * math.sqrt(max(out, in_))
        case "spectral":
            return math.sqrt(out / in_)
        case "keller":
            return math.sqrt(max(1.0, out / in_))
        case "none":
            return 1.0
        case _:
            raise ConfigError(f"no shape factor is called {scale!r}: {nearest(scale, SCALES)}")
