"""From a learning rate under one shape factor to one under another.

A step is `lr * factor(out, in) * O`, so that the learning rate that gives the same step under
another factor depends on the shape of the matrix: no single number converts between conventions.
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
    """Return the learning rate that under `to` takes the step that `lr` takes under `from_`.

    Args:
        lr: learning rate under `from_`.
        from_: shape factor that `lr` was tuned with (as `shape_factor` takes it).
        to: shape factor that it is wanted for.
        shape: (out, in) of the logical matrix.
        rms: of "rms" and "rms_exact", on either side.
        last: "row" or "col" where a post-normalization ends with it, on both sides.

    Raises:
        ConfigError: for an unknown name, or a factor of zero under `to`.

    Example:
        >>> round(convert_lr(0.02, "keller", "rms", (1024, 4096)), 7)
        0.0015625
    """
    divisor = shape_factor(to, shape, rms, last)
    if not divisor > 0:
        raise ConfigError(
            f"shape factor {to!r} is {divisor} at shape {shape}: no lr converts to it; choose another"
        )
    return lr * shape_factor(from_, shape, rms, last) / divisor


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One shape in a conversion table."""

    shape: tuple[int, int]
    count: int
    """Matrices of this shape."""
    factor: float
    """Multiply the learning rate of these matrices by this."""


@dataclass(frozen=True, kw_only=True)
class ConversionTable:
    """How a learning rate converts, shape by shape."""

    rows: tuple[Conversion, ...]
    best: float
    """The single factor that is nearest to all: least squares in the logarithm, one vote a matrix."""
    spread: float
    """Largest factor over smallest: 1 where a single number converts exactly."""


def conversion_table(
    shapes: Iterable[tuple[int, int]],
    from_: ScaleLike,
    to: ScaleLike,
    rms: float = 0.2,
    last: str | None = None,
) -> ConversionTable:
    """Return the factor from a learning rate under `from_` to one under `to`, for every shape.

    Args:
        shapes: (out, in) of every logical matrix; the same shape may come again.
        from_: shape factor to convert from.
        to: shape factor to convert to.
        rms: of "rms" and "rms_exact", on either side.
        last: as for `convert_lr`.

    Raises:
        ConfigError: as `convert_lr`, or if there is no shape.

    Example:
        >>> table = conversion_table([(64, 64), (64, 256), (64, 256)], "keller", "rms")
        >>> [(row.shape, row.count, round(row.factor, 4)) for row in table.rows]
        [((64, 64), 1, 0.625), ((64, 256), 2, 0.3125)]
        >>> round(table.best, 4), round(table.spread, 4)
        (0.3937, 2.0)
    """
    counts = Counter(shapes)
    if not counts:
        raise ConfigError(
            f"{len(counts)} shapes are given, and a conversion needs at least one matrix"
        )
    rows = tuple(
        Conversion(shape=s, count=n, factor=convert_lr(1.0, from_, to, s, rms, last))
        for s, n in counts.items()
    )
    factors = [row.factor for row in rows]
    if min(factors) <= 0:
        raise ConfigError(
            f"shape factor {from_!r} is 0 at one of the shapes: no lr converts from it; choose another"
        )
    logarithm = sum(row.count * math.log(row.factor) for row in rows) / sum(counts.values())
    return ConversionTable(rows=rows, best=math.exp(logarithm), spread=max(factors) / min(factors))
