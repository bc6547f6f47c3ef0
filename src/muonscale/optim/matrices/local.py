"""Sums over logical matrices or their rows, and factors for them, on a rank's part."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from muonscale.optim.matrices.batches import row_state_sharding
from muonscale.optim.matrices.sharding import Piece, Sharding, pieces, read_piece, write_piece_
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec, matrix_shapes, unview, view


@dataclass(frozen=True)
class LocalMatrices:
    """The logical matrices of one parameter, of which this rank holds a part or all."""

    shape: tuple[int, ...]
    """Stored shape of the whole parameter."""
    spec: MatrixSpec
    part: tuple[Sharding, tuple[int, ...]] | None = None
    """Sharding and `shard_coordinates` of the local part; None if the parameter is whole here."""

    @functools.cached_property
    def count(self) -> int:
        """Number of matrices of the whole parameter."""
        return sum(number for number, _, _ in matrix_shapes(self.shape, self.spec))

    @functools.cached_property
    def rows(self) -> int:
        """Number of rows of all matrices of the whole parameter."""
        return self._first_rows[-1]

    @functools.cached_property
    def divides_rows(self) -> bool:
        """Whether the columns of a matrix are sharded, so that no rank has a whole row."""
        return self.part is not None and row_state_sharding(self.part[0]).cuts != self.part[0].cuts

    def dot(self, X: Tensor, Y: Tensor) -> Tensor:
        """Return `[count]`: the sum of `X*Y` over the local part of every matrix."""
        if self.part is None:
            both = zip(view(X, self.spec), view(Y, self.spec), strict=True)
            return torch.cat([(x * y).sum((-2, -1)) for x, y in both])
        sums = X.new_zeros(self.count)
        for piece in pieces(*self.part):
            x, y = (read_piece(Z, self.spec, piece) for Z in (X, Y))
            sums[piece.matrix] += (x * y).sum()
        return sums

    def scale_(self, X: Tensor, factors: Tensor) -> None:
        """Multiply the local part of every matrix by its factor, of `[count]`."""
        if self.count == 1:
            X.mul_(factors[0])
            return
        if self.part is None:
            parts = view(X, self.spec)
            own = factors.split([len(part) for part in parts])
            scaled = [x * f.view(-1, 1, 1) for x, f in zip(parts, own, strict=True)]
            X.copy_(unview(scaled, self.spec, X.shape))
            return
        for piece in pieces(*self.part):
            values = read_piece(X, self.spec, piece) * factors[piece.matrix]
            write_piece_(X, self.spec, piece, values)

    def row_dot(self, X: Tensor, Y: Tensor) -> Tensor:
        """Return `[rows]`: the sum of `X*Y` over the local part of every row, in order."""
        if self.part is None:
            both = zip(view(X, self.spec), view(Y, self.spec), strict=True)
            return torch.cat([(x * y).sum(-1).flatten() for x, y in both])
        sums = X.new_zeros(self.rows)
        for piece in pieces(*self.part):
            x, y = (read_piece(Z, self.spec, piece) for Z in (X, Y))
            sums[self._span(piece)] += (x * y).sum(-1)
        return sums

    def scale_rows_(self, X: Tensor, factors: Tensor) -> Tensor:
        """Multiply the local part of every row by its factor, of `[rows]`, and return `X`."""
        if self.part is None:
            if self.spec == PLAIN:
                return X.mul_(factors.view(*X.shape[:-1], 1))
            return X.copy_(unview(self._scaled(view(X, self.spec), factors), self.spec, X.shape))
        for piece in pieces(*self.part):
            values = read_piece(X, self.spec, piece) * factors[self._span(piece)].unsqueeze(1)
            write_piece_(X, self.spec, piece, values)
        return X

    def read_rows(self, state: Tensor) -> Tensor:
        """Return `[rows]` of per-row state, see `row_state_shape`; 0 for rows of other ranks."""
        if self._row_part is None:
            return torch.cat([part[..., 0].flatten() for part in view(state, self.spec)])
        values = state.new_zeros(self.rows)
        for piece in pieces(*self._row_part):
            values[self._span(piece)] = read_piece(state, self.spec, piece)[:, 0]
        return values

    def spread(self, state: Tensor, like: Tensor) -> Tensor:
        """Return per-row state that broadcasts to the local tensor `like`; not to be written to."""
        if not self.spec.by_columns:
            return state
        return self.scale_rows_(torch.ones_like(like), self.read_rows(state))

    def write_rows(self, values: Tensor, like: Tensor) -> Tensor:
        """Return per-row state of the shape of `like` from `[rows]`. The inverse of `read_rows`."""
        state = torch.ones_like(like)
        if self._row_part is None:
            parts = self._scaled(view(state, self.spec), values)
            return unview(parts, self.spec, state.shape)
        for piece in pieces(*self._row_part):
            each = values[self._span(piece)].unsqueeze(1).expand(piece.shape)
            write_piece_(state, self.spec, piece, each)
        return state

    @staticmethod
    def _scaled(parts: list[Tensor], factors: Tensor) -> list[Tensor]:
        counts = [part.shape[0] * part.shape[1] for part in parts]
        each = zip(parts, factors.split(counts), strict=True)
        return [part * own.view(*part.shape[:2], 1) for part, own in each]

    @functools.cached_property
    def _row_part(self) -> tuple[Sharding, tuple[int, ...]] | None:
        if self.part is None:
            return None
        sharding = row_state_sharding(self.part[0])
        pairs = zip(self.part[1], sharding.cuts, strict=True)
        return sharding, tuple(0 if cut is None else place for place, cut in pairs)

    @functools.cached_property
    def _first_rows(self) -> list[int]:
        """The number of the first row of every matrix among all rows, and the number of rows."""
        shapes = matrix_shapes(self.shape, self.spec)
        rows = [out for number, out, _ in shapes for _ in range(number)]
        return [0, *itertools.accumulate(rows)]

    def _span(self, piece: Piece) -> slice:
        first = self._first_rows[piece.matrix]
        return slice(first + piece.rows[0], first + piece.rows[1])
