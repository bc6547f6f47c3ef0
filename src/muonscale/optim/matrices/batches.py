"""Logical matrices of many parameters, gathered by shape into batches and put back.

Shapes: N matrices, M rows (out), K columns (in).
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muonscale.optim.matrices.sharding import Sharding
from muonscale.optim.matrices.spec import MatrixSpec, matrix_shapes, unview, view

MatrixShape = tuple[int, int]
"""(out, in) of a logical matrix."""


@dataclass(frozen=True)
class MatrixBatches:
    """Where the matrices of some parameters go: those of one shape into one batch."""

    shapes: list[tuple[int, ...]]
    """Stored shapes of the parameters."""
    layouts: list[MatrixSpec]

    def gather(self, tensors: Sequence[Tensor]) -> dict[MatrixShape, Tensor]:
        """Return `[N, M, K]` by matrix shape, from tensors with the parameters' stored shapes."""
        return self._cat([view(t, layout) for t, layout in zip(tensors, self.layouts, strict=True)])

    def scatter(self, stacks: dict[MatrixShape, Tensor]) -> list[Tensor]:
        """Return tensors with the parameters' stored shapes: the inverse of `gather`."""
        return [
            unview(pieces, layout, shape)
            for pieces, layout, shape in zip(
                self._cut(stacks), self.layouts, self.shapes, strict=True
            )
        ]

    def gather_rows(self, states: Sequence[Tensor]) -> dict[MatrixShape, Tensor]:
        """Return `[N, M, 1]` by matrix shape, from tensors of the shapes of `row_state_shape`."""
        viewed = [view(state, layout) for state, layout in zip(states, self.layouts, strict=True)]
        return self._cat([[piece[..., :1] for piece in pieces] for pieces in viewed])

    def scatter_rows(self, rows: dict[MatrixShape, Tensor]) -> list[Tensor]:
        """Return tensors of the shapes of `row_state_shape`: the inverse of `gather_rows`."""
        states = []
        for pieces, layout, shape in zip(self._cut(rows), self.layouts, self.shapes, strict=True):
            stored = row_state_shape(shape, layout)
            widths = [width for _, _, width in known_shapes(stored, layout)]
            wide = [p.expand(-1, -1, w) for p, w in zip(pieces, widths, strict=True)]
            states.append(unview(wide, layout, stored))
        return states

    @functools.cached_property
    def _pieces(self) -> list[tuple[tuple[int, int, int], ...]]:
        """(number, out, in) of every batch that `view` gives for each parameter."""
        return [known_shapes(s, m) for s, m in zip(self.shapes, self.layouts, strict=True)]

    def _cat(self, viewed: list[list[Tensor]]) -> dict[MatrixShape, Tensor]:
        alike: dict[MatrixShape, list[Tensor]] = defaultdict(list)
        for tensors, shapes in zip(viewed, self._pieces, strict=True):
            for tensor, (_, out, in_) in zip(tensors, shapes, strict=True):
                alike[out, in_].append(tensor)
        return {s: own[0] if len(own) == 1 else torch.cat(own) for s, own in alike.items()}

    def _cut(self, stacks: dict[MatrixShape, Tensor]) -> list[list[Tensor]]:
        numbers: dict[MatrixShape, list[int]] = defaultdict(list)
        for shapes in self._pieces:
            for number, out, in_ in shapes:
                numbers[out, in_].append(number)
        left = {shape: iter(stacks[shape].split(own)) for shape, own in numbers.items()}
        return [[next(left[out, in_]) for _, out, in_ in shapes] for shapes in self._pieces]


@functools.cache
def known_shapes(shape: tuple[int, ...], layout: MatrixSpec) -> tuple[tuple[int, int, int], ...]:
    """Return `matrix_shapes(shape, layout)`, remembered from step to step."""
    return tuple(matrix_shapes(shape, layout))


def row_state_sharding(layout: Sharding) -> Sharding:
    """Return how the row state of a parameter lies: as its rows do, alike wherever columns are cut."""
    stored, axes = layout.matrices, len(layout.shape)
    if stored.flattened:
        columns = {0} if stored.transposed else set(range(1, axes))
    else:
        columns = {axes - 2} if stored.transposed else {axes - 1}
    cuts = tuple(None if c is not None and c.axis in columns else c for c in layout.cuts)
    return replace(layout, shape=row_state_shape(layout.shape, stored), cuts=cuts)


def row_state_shape(shape: Sequence[int], layout: MatrixSpec) -> tuple[int, ...]:
    """Return the shape of a tensor that holds one value per row of every logical matrix.

    It is stored as the parameter is, with `in` cut down to 1: `[out, 1]` for `[out, in]`, and rides
    wherever the parameter's rows go. Where heads are blocks of columns there is a column per head.

    Example:
        >>> row_state_shape((8, 64, 32), MatrixSpec())
        (8, 64, 1)
        >>> row_state_shape((32, 96), MatrixSpec(transposed=True, splits=(32, 32, 32)))
        (1, 96)
    """
    columns = 1
    if layout.by_columns:
        heads = (layout.heads,) if isinstance(layout.heads, int) else layout.heads
        columns = math.lcm(*heads)
    if layout.flattened:
        if layout.transposed:
            return (columns, *shape[1:])
        return (shape[0], columns, *[1] * (len(shape) - 2))
    if layout.transposed:
        return (*shape[:-2], columns, shape[-1])
    return (*shape[:-1], columns)
