from __future__ import annotations

import pytest
import torch

from muonscale.errors import LayoutError
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec, matrix_shapes, unview, view

CASES = [
    ((6, 4), PLAIN, [(1, 6, 4)]),
    ((6, 4), MatrixSpec(transposed=True), [(1, 4, 6)]),
    ((6, 4), MatrixSpec(splits=(3, 2, 1)), [(1, 3, 4), (1, 2, 4), (1, 1, 4)]),
    ((4, 6), MatrixSpec(transposed=True, splits=(2, 4)), [(1, 2, 4), (1, 4, 4)]),
    ((3, 6, 4), PLAIN, [(3, 6, 4)]),
    ((2, 3, 6, 4), PLAIN, [(6, 6, 4)]),
    ((3, 6, 4), MatrixSpec(splits=(3, 3)), [(3, 3, 4), (3, 3, 4)]),
    ((3, 4, 6), MatrixSpec(transposed=True, splits=(3, 3), groups=3), [(3, 3, 4)] * 2),
    ((5, 3, 2, 2), MatrixSpec(flattened=True), [(1, 5, 12)]),
    ((6, 3, 2, 2), MatrixSpec(flattened=True, heads=2), [(2, 3, 12)]),
    ((6, 3, 2, 2), MatrixSpec(flattened=True, transposed=True), [(1, 12, 6)]),
    ((6, 3, 2, 2), MatrixSpec(flattened=True, transposed=True, heads=2, by_columns=True),
     [(2, 12, 3)]),
    # XLNet: (in, heads, size of a head), and the way back
    ((6, 4, 3), MatrixSpec(flattened=True, transposed=True, heads=4), [(4, 3, 6)]),
    ((6, 4, 3), MatrixSpec(flattened=True, heads=4, by_columns=True), [(4, 6, 3)]),
    # grouped-query attention, stacked: 4 heads of queries on 2 of keys and values
    ((8, 3), MatrixSpec(splits=(4, 2, 2)), [(1, 4, 3), (1, 2, 3), (1, 2, 3)]),
    ((8, 3), MatrixSpec(splits=(4, 2, 2), heads=(4, 2, 2)), [(4, 1, 3), (2, 1, 3), (2, 1, 3)]),
    # ... and by groups of heads that share a key
    ((16, 3), MatrixSpec(splits=(8, 4, 4), groups=2), [(1, 8, 3), (1, 4, 3), (1, 4, 3)]),
    # GPT-NeoX: q, k, v of each of 4 heads in turn; then also a matrix for each head
    ((24, 5), MatrixSpec(splits=(8, 8, 8), groups=4), [(1, 8, 5)] * 3),
    ((24, 5), MatrixSpec(splits=(8, 8, 8), groups=4, heads=4), [(4, 2, 5)] * 3),
    # latent attention: 2 heads of 3 rows of keys and 2 of values
    ((10, 4), MatrixSpec(splits=(6, 4), groups=2), [(1, 6, 4), (1, 4, 4)]),
    ((10, 4), MatrixSpec(splits=(6, 4), groups=2, heads=2), [(2, 3, 4), (2, 2, 4)]),
    ((8, 3), MatrixSpec(heads=4), [(4, 2, 3)]),
    ((3, 8), MatrixSpec(heads=4, by_columns=True), [(4, 3, 2)]),
    ((8, 3), MatrixSpec(heads=4, by_columns=True, transposed=True), [(4, 3, 2)]),
    ((3, 8), MatrixSpec(heads=4, by_columns=True, interleaved=True), [(4, 3, 2)]),
    ((2, 8, 3), MatrixSpec(heads=2, by_columns=True, interleaved=True, transposed=True),
     [(4, 3, 4)]),
    ((2, 8, 3), MatrixSpec(heads=2), [(4, 4, 3)]),
    ((2, 3, 8), MatrixSpec(heads=2, by_columns=True), [(4, 3, 4)]),
    ((2, 3, 8), MatrixSpec(splits=(1, 2), heads=(4, 2), by_columns=True), [(8, 1, 2), (4, 2, 4)]),
    ((2, 6, 8), MatrixSpec(transposed=True, splits=(4, 4), groups=2, heads=(1, 2)),
     [(2, 4, 6), (4, 2, 6)]),
    ((1, 7), PLAIN, [(1, 1, 7)]),
    ((7, 1), MatrixSpec(transposed=True), [(1, 1, 7)]),
    ((1, 1), PLAIN, [(1, 1, 1)]),
    ((0, 4), PLAIN, [(1, 0, 4)]),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "layout", "expected"), CASES)
def test_view_gives_the_shapes_and_unview_undoes_it(shape, layout, expected) -> None:
    X = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    batches = view(X, layout)
    assert [tuple(b.shape) for b in batches] == expected == matrix_shapes(shape, layout)
    assert torch.equal(unview(batches, layout, shape), X)


def test_every_element_is_in_one_matrix_at_the_place_its_index_says() -> None:
    shape, layout = (2, 5, 24), MatrixSpec(transposed=True, splits=(12, 6, 6), groups=3, heads=3)
    X = torch.arange(torch.Size(shape).numel()).view(shape)
    q, k, v = view(X, layout)
    for e in range(2):
        for head in range(3):
            for row in range(4):  # rows of the group: four of q, two of k, two of v
                assert torch.equal(q[e * 3 + head, row], X[e, :, head * 8 + row])
            for row in range(2):
                assert torch.equal(k[e * 3 + head, row], X[e, :, head * 8 + 4 + row])
                assert torch.equal(v[e * 3 + head, row], X[e, :, head * 8 + 6 + row])


def test_heads_of_columns_are_blocks_of_columns() -> None:
    X = torch.arange(12.0).view(2, 6)
    (heads,) = view(X, MatrixSpec(heads=3, by_columns=True))
    assert [h.tolist() for h in heads] == [X[:, i : i + 2].tolist() for i in (0, 2, 4)]


def test_a_view_of_contiguous_matrices_copies_nothing() -> None:
    X = torch.zeros(12, 4)
    for layout in (
        PLAIN,
        MatrixSpec(splits=(8, 4)),
        MatrixSpec(heads=3),
        MatrixSpec(transposed=True),
    ):
        for batch in view(X, layout):
            assert batch.untyped_storage().data_ptr() == X.untyped_storage().data_ptr()


def test_rows_are_blocks_unless_grouped() -> None:
    X = torch.arange(6.0).view(6, 1)
    blocks = view(X, MatrixSpec(splits=(3, 3)))
    interleaved = view(X, MatrixSpec(splits=(3, 3), groups=3))
    assert [b.flatten().tolist() for b in blocks] == [[0, 1, 2], [3, 4, 5]]
    assert [b.flatten().tolist() for b in interleaved] == [[0, 2, 4], [1, 3, 5]]


def test_a_transposed_parameter_is_seen_as_out_by_in() -> None:
    X = torch.randn(3, 5)
    (batch,) = view(X, MatrixSpec(transposed=True))
    assert torch.equal(batch[0], X.T)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 4), MatrixSpec(splits=(3, 2))),
        ((6, 4), MatrixSpec(splits=(4, 2), groups=4)),
        ((6,), PLAIN),
        ((6, 4), MatrixSpec(splits=(7, -1))),
        ((6, 4), MatrixSpec(splits=(3, 3), groups=2)),
        ((6, 4), MatrixSpec(groups=2)),
        ((6, 4), MatrixSpec(splits=(3, 3), groups=0)),
        ((6, 4), MatrixSpec(heads=4)),
        ((6, 4), MatrixSpec(heads=0)),
        ((6, 4), MatrixSpec(heads=3, by_columns=True)),
        ((6, 4), MatrixSpec(heads=3, interleaved=True)),
        ((6, 4, 2), MatrixSpec(heads=2, by_columns=True, interleaved=True, flattened=True)),
        ((6, 4), MatrixSpec(splits=(3, 3), heads=(3,))),
    ],
)
def test_layouts_that_do_not_fit_are_refused(shape: tuple[int, ...], layout: MatrixSpec) -> None:
    with pytest.raises(LayoutError):
        matrix_shapes(shape, layout)
