"""Shape factors: numbers that multiply an update, computed from the shape of its matrix.

An exact polar factor of an `(out, in)` matrix of full rank has RMS `1/sqrt(max(out, in))`
(Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, lemma 1). Rows of unit length have
RMS `1/sqrt(in)`, columns of unit length `1/sqrt(out)`.

Other projects' names are *aliases*: formulas, applied literally. The same word can mean two
things: "spectral" is sqrt(out/in) here and sqrt(max(out, in)) in NVIDIA's optimizers, so the name
of theirs is "nvidia:spectral".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from muonscale.errors import ConfigError, nearest

ScaleLike = str | float | Callable[[int, int], float]
"""Name of a shape factor, one number for all shapes, or a function of (out, in)."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A factor that depends on the shape alone, with its source."""

    formula: str
    of: Callable[[int, int], float]
    source: str


def _keller(out: int, in_: int) -> float:
    return math.sqrt(max(1.0, out / in_))


def _spectral(out: int, in_: int) -> float:
    return math.sqrt(out / in_)


def _largest(out: int, in_: int) -> float:
    return math.sqrt(max(out, in_))


def _moonlight(out: int, in_: int) -> float:
    return 0.2 * math.sqrt(max(out, in_))


def _one(out: int, in_: int) -> float:
    return 1.0


FACTORS: dict[str, Factor] = {
    "spectral": Factor(
        formula="sqrt(out/in)",
        of=_spectral,
        source="Yang et al., A Spectral Condition for Feature Learning, arXiv 2310.17813, "
        "condition 1",
    ),
    "keller": Factor(
        formula="sqrt(max(1, out/in))", of=_keller, source="Jordan et al., Muon (2024), code"
    ),
    "none": Factor(formula="1", of=_one, source="the polar factor as it is"),
}
"""Factors by our names. Besides them there are "rms" and "rms_exact"."""

SCALES: tuple[str, ...] = ("rms", "rms_exact", *FACTORS)
"""The names that `shape_factor` knows as its own."""


def _alias(formula: str, of: Callable[[int, int], float], where: str) -> Factor:
    return Factor(formula=formula, of=of, source=where)


ALIASES: dict[str, Factor] = {
    "torch:original": _alias("sqrt(max(1, out/in))", _keller, "torch.optim.Muon, adjust_lr_fn"),
    "torch:match_rms_adamw": _alias("0.2*sqrt(max(out, in))", _moonlight, "torch.optim.Muon"),
    "torch:spectral_unclamped": _alias("sqrt(out/in)", _spectral, "torch.optim.Muon from 2.14"),
    "timm:original": _alias("sqrt(max(1, out/in))", _keller, "timm.optim.Muon, adjust_lr_fn"),
    "timm:match_rms_adamw": _alias("0.2*sqrt(max(out, in))", _moonlight, "timm.optim.Muon"),
    "timm:rms_to_rms": _alias("sqrt(out/in)", _spectral, "timm.optim.Muon"),
    "dion:spectral_norm": _alias("sqrt(out/in)", _spectral, "microsoft/dion, adjust_lr"),
    "dion:rms_norm": _alias("0.2*sqrt(max(out, in))", _moonlight, "microsoft/dion, adjust_lr"),
    "nvidia:shape_scaling": _alias(
        "sqrt(max(1, out/in))", _keller, "NVIDIA Emerging-Optimizers, scale_mode"
    ),
    "nvidia:unit_rms_norm": _alias("sqrt(out/in)", _spectral, "NVIDIA Emerging-Optimizers"),
    "nvidia:spectral": _alias(
        "sqrt(max(out, in))", _largest, "NVIDIA Emerging-Optimizers, before extra_scale_factor"
    ),
    "optax:consistent_rms": _alias(
        "0.2*sqrt(max(out, in))", _moonlight, "optax.contrib.muon with consistent_rms=0.2"
    ),
}
"""Other projects' names, as project:name. The name alone is accepted if it has one meaning."""


def _bare_names() -> dict[str, Factor]:
    """Return the aliases by name alone, except names with two meanings."""
    meanings: dict[str, list[Factor]] = {}
    for full, factor in ALIASES.items():
        meanings.setdefault(full.partition(":")[2], []).append(factor)
    return {
        name: factors[0]
        for name, factors in meanings.items()
        if name not in SCALES and len({factor.of for factor in factors}) == 1
    }


_LITERAL: dict[str, Factor] = {**FACTORS, **ALIASES, **_bare_names()}


def check_scale(scale: ScaleLike) -> None:
    """Raise ConfigError for an unknown name, or a number that is not above 0 and finite."""
    if isinstance(scale, (int, float)) and not isinstance(scale, bool):
        if not 0 < scale < math.inf:
            raise ConfigError(f"scale is {scale}: a number has to be above 0 and finite")
        return
    if callable(scale) or scale in ("rms", "rms_exact", *_LITERAL):
        return
    hint = nearest(str(scale), {*SCALES, *_LITERAL})
    raise ConfigError(f"no shape factor is called {scale!r}: {hint}")


def shape_factor(
    scale: ScaleLike, shape: tuple[int, int], rms: float, last: str | None = None
) -> float:
    """Return the factor for a logical matrix of `shape` = (out, in).

    | scale | factor | source |
    |---|---|---|
    | rms | `rms*sqrt(max(out, in))` | arXiv 2502.16982, equation 4 (there rms is 0.2) |
    | rms, if `last` is "row" | `rms*sqrt(in)` | the RMS is again `rms` |
    | rms, if `last` is "col" | `rms*sqrt(out)` | the RMS is again `rms` |
    | rms_exact | that of rms; the optimizer divides by the realized RMS | arXiv 2502.16982, 2.2 |
    | spectral | `sqrt(out/in)` | Yang et al., arXiv 2310.17813, condition 1 |
    | keller | `sqrt(max(1, out/in))` | Jordan et al., Muon (2024), reference code |
    | none | 1 | |
    | a number | itself | `0.2*sqrt(hidden size)`: arXiv 2502.16982, table 1, baseline |
    | a function | `scale(out, in)` | |
    | an alias | its formula | `ALIASES` |

    Args:
        scale: one of the names above, or a function of (out, in).
        shape: (out, in) of the logical matrix, not of the stored parameter.
        rms: RMS that the scaled update is to have; used by "rms" and "rms_exact" alone.
        last: "row" or "col" where a post-normalization has made rows or columns of unit length;
            used by "rms" alone, all other factors are literal.

    Raises:
        ConfigError: for an unknown name.

    Examples:
        >>> round(shape_factor("rms", (64, 256), 0.2), 6)
        3.2
        >>> round(shape_factor("rms", (64, 256), 0.2, last="col"), 6)
        1.6
    """
    check_scale(scale)
    out, in_ = shape
    if 0 in shape:
        return 0.0
    if isinstance(scale, (int, float)):
        return float(scale)
    if callable(scale):
        return float(scale(out, in_))
    if scale in ("rms", "rms_exact"):
        length = {None: max(out, in_), "row": in_, "col": out}[last]
        return rms * math.sqrt(length)
    return _LITERAL[scale].of(out, in_)


def exact_factor(sum_of_squares: Tensor, shape: tuple[int, int], rms: float) -> Tensor:
    """Return the factor that gives matrices the RMS `rms`: `rms*sqrt(out*in)/||O||_F`.

    Args:
        sum_of_squares: `[N, 1, 1]`, of every matrix as a whole.
        shape: (out, in) of the logical matrices.
        rms: RMS to reach.

    Returns:
        `[N, 1, 1]`; finite for a zero matrix, which stays zero.
    """
    norm = sum_of_squares.masked_fill(sum_of_squares == 0, 1.0).sqrt_()
    return rms * math.sqrt(math.prod(shape)) / norm
