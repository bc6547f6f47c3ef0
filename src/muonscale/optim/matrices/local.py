"""Sums over logical matrices and factors for them, on the part of a parameter that is on this rank."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from muonscale.optim.matrices.sharding import Sharding, pieces, read_piece, write_piece_
from muonscale.optim.matrices.spec import MatrixSpec, matrix_shapes, unview, view


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
