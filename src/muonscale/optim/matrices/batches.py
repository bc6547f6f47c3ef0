"""Batches of the logical matrices of many parameters, one for each shape.

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
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec, matrix_shapes, unview, view

MatrixShape = tuple[int, int]
"""(out, in) of a logical matrix."""


@dataclass(frozen=True)
class MatrixBatches:
    """Gathers the matrices of some parameters into one batch per shape, and scatters them back."""

    shapes: list[tuple[int, ...]]
    """Stored shapes of the parameters."""
    specs: list[MatrixSpec]
    """How the matrices of each parameter are stored."""

    def gather(self, tensors: Sequence[Tensor]) -> dict[MatrixShape, Tensor]:
        """Return `[N, M, K]` by matrix shape. The tensors have the parameters' stored shapes."""
        if self._are_equal_and_plain:
            batch = torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)
            return {tuple(batch.shape[1:]): batch}  # type: ignore[dict-item]
        return self._cat([view(t, spec) for t, spec in zip(tensors, self.specs, strict=True)])

    def scatter(self, batches: dict[MatrixShape, Tensor]) -> list[Tensor]:
        """Return tensors with the parameters' stored shapes. The inverse of `gather`."""
        if self._are_equal_and_plain:
            return list(next(iter(batches.values())).unbind())
        return [
            unview(parts, spec, shape)
            for parts, spec, shape in zip(
                self._split(batches), self.specs, self.shapes, strict=True
            )
        ]

    def gather_rows(self, states: Sequence[Tensor]) -> dict[MatrixShape, Tensor]:
        """Return `[N, M, 1]` by matrix shape. The tensors have the shapes of `row_state_shape`."""
        viewed = [view(state, spec) for state, spec in zip(states, self.specs, strict=True)]
        return self._cat([[part[..., :1] for part in parts] for parts in viewed])

    def scatter_rows(self, rows: dict[MatrixShape, Tensor]) -> list[Tensor]:
        """Return tensors with the shapes of `row_state_shape`. The inverse of `gather_rows`."""
        states = []
        for parts, spec, shape in zip(self._split(rows), self.specs, self.shapes, strict=True):
            stored = row_state_shape(shape, spec)
            widths = [width for _, _, width in cached_matrix_shapes(stored, spec)]
            wide = [p.expand(-1, -1, w) for p, w in zip(parts, widths, strict=True)]
            states.append(unview(wide, spec, stored))
        return states

    @functools.cached_property
    def _are_equal_and_plain(self) -> bool:
        """Whether every parameter is one plain matrix, and all have the same shape."""
        return (
            len(self.shapes[0]) == 2
            and all(shape == self.shapes[0] for shape in self.shapes)
            and all(spec is PLAIN or spec == PLAIN for spec in self.specs)
        )

    @functools.cached_property
    def _part_shapes(self) -> list[tuple[tuple[int, int, int], ...]]:
        """(number, out, in) of each batch that `view` returns, for each parameter."""
        return [cached_matrix_shapes(s, m) for s, m in zip(self.shapes, self.specs, strict=True)]

    def _cat(self, viewed: list[list[Tensor]]) -> dict[MatrixShape, Tensor]:
        by_shape: dict[MatrixShape, list[Tensor]] = defaultdict(list)
        for tensors, shapes in zip(viewed, self._part_shapes, strict=True):
            for tensor, (_, out, in_) in zip(tensors, shapes, strict=True):
                by_shape[out, in_].append(tensor)
        return {s: own[0] if len(own) == 1 else torch.cat(own) for s, own in by_shape.items()}

    def _split(self, batches: dict[MatrixShape, Tensor]) -> list[list[Tensor]]:
        numbers: dict[MatrixShape, list[int]] = defaultdict(list)
        for shapes in self._part_shapes:
            for number, out, in_ in shapes:
                numbers[out, in_].append(number)
        left = {shape: iter(batches[shape].split(own)) for shape, own in numbers.items()}
        return [[next(left[out, in_]) for _, out, in_ in shapes] for shapes in self._part_shapes]


@functools.cache
def cached_matrix_shapes(
    shape: tuple[int, ...], spec: MatrixSpec
) -> tuple[tuple[int, int, int], ...]:
    """Return `matrix_shapes(shape, spec)`, cached."""
    return tuple(matrix_shapes(shape, spec))


def row_state_sharding(sharding: Sharding) -> Sharding:
    """Return the sharding of per-row state.

    It is sharded as the rows are, and replicated over mesh axes that divide columns.
    """
    spec, axes = sharding.matrices, len(sharding.shape)
    if spec.flattened:
        columns = {0} if spec.transposed else set(range(1, axes))
    else:
        columns = {axes - 2} if spec.transposed else {axes - 1}
    cuts = tuple(None if c is not None and c.axis in columns else c for c in sharding.cuts)
    return replace(sharding, shape=row_state_shape(sharding.shape, spec), cuts=cuts)


def row_state_shape(shape: Sequence[int], spec: MatrixSpec) -> tuple[int, ...]:
    """Return the shape of a tensor that holds one value per row of every logical matrix.

    It is stored as the parameter is, but with an `in` of 1: `[out, 1]` for `[out, in]`. The rows of
    the parameter and of the state can therefore be sharded in the same way. If heads are blocks of
    columns, there is one column for each head.

    Examples:
        >>> row_state_shape((8, 64, 32), MatrixSpec())
        (8, 64, 1)
        >>> row_state_shape((32, 96), MatrixSpec(transposed=True, splits=(32, 32, 32)))
        (1, 96)
    """
    columns = 1
    if spec.by_columns:
        heads = (spec.heads,) if isinstance(spec.heads, int) else spec.heads
        columns = math.lcm(*heads)
    if spec.flattened:
        if spec.transposed:
            return (columns, *shape[1:])
        return (shape[0], columns, *[1] * (len(shape) - 2))
    if spec.transposed:
        return (*shape[:-2], columns, shape[-1])
    return (*shape[:-1], columns)
