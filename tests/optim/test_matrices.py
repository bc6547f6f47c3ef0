from __future__ import annotations

import pytest
import torch

from muonscale.errors import LayoutError
from muonscale.optim.matrices import PLAIN, Matrices, matrix_shapes, unview, view

CASES = [
    ((6, 4), PLAIN, [(1, 6, 4)]),
    ((6, 4), Matrices(transposed=True), [(1, 4, 6)]),
    ((6, 4), Matrices(splits=(3, 2, 1)), [(1, 3, 4), (1, 2, 4), (1, 1, 4)]),
    ((4, 6), Matrices(transposed=True, splits=(2, 4)), [(1, 2, 4), (1, 4, 4)]),
    ((3, 6, 4), PLAIN, [(3, 6, 4)]),
    ((2, 3, 6, 4), PLAIN, [(6, 6, 4)]),
    ((3, 6, 4), Matrices(splits=(3, 3)), [(3, 3, 4), (3, 3, 4)]),
    ((3, 4, 6), Matrices(transposed=True, splits=(3, 3), interleaved=True), [(3, 3, 4)] * 2),
    ((5, 3, 2, 2), Matrices(flattened=True), [(1, 5, 12)]),
]


@pytest.mark.parametrize(("shape", "layout", "expected"), CASES)
def test_view_gives_the_shapes_and_unview_undoes_it(shape, layout, expected) -> None:
    X = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    batches = view(X, layout)
    assert [tuple(b.shape) for b in batches] == expected == matrix_shapes(shape, layout)
    assert torch.equal(unview(batches, layout, shape), X)


def test_rows_are_blocks_unless_interleaved() -> None:
    X = torch.arange(6.0).view(6, 1)
    blocks = view(X, Matrices(splits=(3, 3)))
    woven = view(X, Matrices(splits=(3, 3), interleaved=True))
    assert [b.flatten().tolist() for b in blocks] == [[0, 1, 2], [3, 4, 5]]
    assert [b.flatten().tolist() for b in woven] == [[0, 2, 4], [1, 3, 5]]


def test_a_transposed_parameter_is_seen_as_out_by_in() -> None:
    X = torch.randn(3, 5)
    (batch,) = view(X, Matrices(transposed=True))
    assert torch.equal(batch[0], X.T)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 4), Matrices(splits=(3, 2))),
        ((6, 4), Matrices(splits=(4, 2), interleaved=True)),
        ((6,), PLAIN),
    ],
)
def test_layouts_that_do_not_fit_are_refused(shape: tuple[int, ...], layout: Matrices) -> None:
    with pytest.raises(LayoutError):
        matrix_shapes(shape, layout)
