"""The boxes in which partitioned state is saved: every element of every matrix once, in its place."""

from __future__ import annotations

import pytest
import torch

from muonscale.optim.distributed.zero1 import stored_boxes
from muonscale.optim.matrices.sharding import Sharding, pieces
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec, view

CASES: list[tuple[tuple[int, ...], MatrixSpec]] = [
    ((6, 4), PLAIN),
    ((2, 3, 6, 4), MatrixSpec(transposed=True, splits=(2, 2), groups=2)),
    ((24, 5), MatrixSpec(splits=(8, 8, 8), groups=4, heads=4)),
    ((3, 8), MatrixSpec(heads=4, by_columns=True)),
    ((6, 3, 2, 2), MatrixSpec(flattened=True)),
    ((6, 3, 2, 2), MatrixSpec(flattened=True, heads=3)),
    ((6, 3, 2, 2), MatrixSpec(flattened=True, transposed=True)),
    ((6, 3, 2, 2), MatrixSpec(flattened=True, transposed=True, heads=3, by_columns=True)),
    ((6, 4, 3), MatrixSpec(flattened=True, transposed=True, heads=4)),
    ((6, 4, 3), MatrixSpec(flattened=True, heads=4, by_columns=True)),
    # heads that are no whole rows of the axes: their ranges are several boxes
    ((5, 3, 4, 2), MatrixSpec(flattened=True, transposed=True, heads=2)),
    ((5, 3, 4, 2), MatrixSpec(flattened=True, heads=2, by_columns=True)),
    ((2, 4, 6), MatrixSpec(flattened=True, transposed=True, splits=(8, 16), groups=4)),
]


@pytest.mark.parametrize(("shape", "matrices"), CASES)
def test_boxes_hold_the_elements_of_their_matrices(
    shape: tuple[int, ...], matrices: MatrixSpec
) -> None:
    X = torch.arange(torch.Size(shape).numel()).view(shape)
    whole = [one for batch in view(X, matrices) for one in batch]
    sharding = Sharding(shape, matrices, partitioned=True)
    copy = torch.full(shape, -1)
    for piece in pieces(sharding, (0,)):
        for (offsets, sizes), rows, columns in stored_boxes(sharding, piece):
            box = copy[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            assert box.shape == sizes
            assert bool((box == -1).all())
            values = whole[piece.matrix][rows, columns]
            box.copy_((values.mT if matrices.transposed else values).reshape(sizes))
    assert torch.equal(copy, X)
