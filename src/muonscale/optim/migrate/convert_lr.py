"""Conversion of learning rates between shape factors.

A step is `lr * factor(out, in) * O`. The learning rate that gives the same step under another
factor therefore depends on the shape of the matrix, and no single number converts between two
factors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from muonscale.errors import ConfigError
from muonscale.optim.rules.scale import ScaleLike, shape_factor


def convert_lr(
    lr: float,
    from_: ScaleLike,
    to: ScaleLike,
    shape: tuple[int, int],
    rms: float = 0.2,
    last: str | None = None,
) -> float:
    """Return the learning rate that takes the same step under `to` as `lr` does under `from_`.

    Args:
        lr: learning rate under `from_`.
        from_: shape factor that `lr` was tuned with, as for `shape_factor`.
        to: shape factor to convert to.
        shape: (out, in) of the logical matrix.
        rms: target RMS of "rms" and "rms_exact", for both factors.
        last: "row" or "col" if both optimizers end with such a normalization.

    Raises:
        ConfigError: if a name is unknown, or the factor `to` is not above 0.

    Examples:
        >>> round(convert_lr(0.02, "keller", "rms", (1024, 4096)), 7)
        0.0015625
    """
    divisor = shape_factor(to, shape, rms, last)
    if not divisor > 0:
        raise ConfigError(
            f"shape factor {to!r} is {divisor} at shape {shape}, so no lr converts to it"
        )
    return lr * shape_factor(from_, shape, rms, last) / divisor


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One shape in a conversion table."""

    shape: tuple[int, int]
    count: int
    """Number of matrices of this shape."""
    factor: float
    """Factor of the learning rate of these matrices."""


@dataclass(frozen=True, kw_only=True)
class ConversionTable:
    """The conversion of a learning rate for every shape."""

    rows: tuple[Conversion, ...]
    best: float
    """The closest single factor: least squares of the logarithms over all matrices."""
    spread: float
    """Largest factor over the smallest; 1 if a single number converts exactly."""


def conversion_table(
    shapes: Iterable[tuple[int, int]],
    from_: ScaleLike,
    to: ScaleLike,
    rms: float = 0.2,
    last: str | None = None,
) -> ConversionTable:
    """Return the factor from a learning rate under `from_` to one under `to`, for every shape.

    Args:
        shapes: (out, in) of every logical matrix, with repetitions.
        from_: shape factor to convert from.
        to: shape factor to convert to.
        rms: as for `convert_lr`.
        last: as for `convert_lr`.

    Raises:
        ConfigError: as for `convert_lr`, or if there is no shape.

    Examples:
        >>> table = conversion_table([(64, 64), (64, 256), (64, 256)], "keller", "rms")
        >>> [(row.shape, row.count, round(row.factor, 4)) for row in table.rows]
        [((64, 64), 1, 0.625), ((64, 256), 2, 0.3125)]
        >>> round(table.best, 4), round(table.spread, 4)
        (0.3937, 2.0)
    """
    counts = Counter(shapes)
    if not counts:
        raise ConfigError(
            f"a conversion table needs at least one matrix, but got {len(counts)} shapes"
        )
    rows = tuple(
        Conversion(shape=s, count=n, factor=convert_lr(1.0, from_, to, s, rms, last))
        for s, n in counts.items()
    )
    factors = [row.factor for row in rows]
    if min(factors) <= 0:
        raise ConfigError(
            f"shape factor {from_!r} is not above 0 at one of the shapes, so no lr converts from it"
        )
    logarithm = sum(row.count * math.log(row.factor) for row in rows) / sum(counts.values())
    return ConversionTable(rows=rows, best=math.exp(logarithm), spread=max(factors) / min(factors))
