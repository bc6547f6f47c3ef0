"""Which part of every logical matrix lies on which rank: a layout is data.

A parameter lies on a mesh of ranks. Every axis of the mesh either cuts an axis of the stored tensor
or holds it as often as it is long. From that follow, for each rank, the *pieces* it holds: (matrix,
rows, columns) boxes of the logical matrices, however these are stored (`MatrixSpec`), transposed,
interleaved or stacked.

A *seat* is a rank's number within the mesh, counted along its last axis first. Ranges are
`(start, stop)`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muonscale.errors import LayoutError
from muonscale.optim.matrices.spec import (
    PLAIN,
    MatrixSpec,
    heads_of,
    matrix_shapes,
    stack_shape,
    stacked,
)

Range = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """How one axis of a mesh divides an axis of the stored tensor, as torch.chunk would."""

    axis: int
    factor: int = 1
    """Each of so many equal parts is divided on its own, and a rank holds its share of every one:
    the `_StridedShard` of FSDP over tensor parallelism."""


@dataclass(frozen=True)
class Sharding:
    """Where a parameter lies; the default is whole on one rank."""

    shape: tuple[int, ...]
    """Of the whole stored tensor."""
    matrices: MatrixSpec = PLAIN
    mesh: tuple[int, ...] = (1,)
    cuts: tuple[Cut | None, ...] = (None,)
    """One for each axis of the mesh; None where the tensor is held by every rank along it."""
    ranks: tuple[int, ...] = (0,)
    """The global ranks of the seats."""
    owned: bool = False
    """The state of each matrix lies whole with the rank that works on it (ZeRO-1 under data
    parallelism), not as the parameter lies."""

    def __hash__(self) -> int:
        """Return a hash computed once: `ranks` may be thousands, and layouts are keys of caches."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.matrices, self.mesh, self.cuts, self.ranks, self.owned))

    def __reduce__(self) -> tuple[type[Sharding], tuple[object, ...]]:
        """Leave the hash out: another process has another."""
        return Sharding, (self.shape, self.matrices, self.mesh, self.cuts, self.ranks, self.owned)

    @property
    def replicated(self) -> bool:
        """Whether every rank holds the whole."""
        return all(cut is None for cut in self.cuts)

    @property
    def copies(self) -> int:
        """How many ranks hold each element."""
        return math.prod(n for n, cut in zip(self.mesh, self.cuts, strict=True) if cut is None)


@dataclass(frozen=True)
class Piece:
    """A box of one logical matrix, and where it is in the local tensor."""

    matrix: int
    """Number of the matrix in the parameter, as `matrices.view` counts: split, leading, head."""
    rows: Range
    columns: Range
    place: tuple[int, int, int]
    """Leading index, first row and first column in the local tensor seen as `[leading, out, in]`."""
    comb: tuple[int, int, int] | None = None
    """(first, share, stride) of rows that lie apart: row r of the split is stored at
    `r // share * stride + first + r % share`. None where they lie together."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the piece."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def elements(self) -> int:
        """Elements of the piece."""
        return math.prod(self.shape)


def within(piece: Piece, rows: Range, columns: Range) -> Piece | None:
    """Return what of a piece lies in a window of its matrix; None if nothing does."""
    r = max(piece.rows[0], rows[0]), min(piece.rows[1], rows[1])
    c = max(piece.columns[0], columns[0]), min(piece.columns[1], columns[1])
    if r[0] >= r[1] or c[0] >= c[1]:
        return None
    stack, row, column = piece.place
    if piece.comb is None:  # else rows are found from their numbers
        row += r[0] - piece.rows[0]
    return replace(piece, rows=r, columns=c, place=(stack, row, column + c[0] - piece.columns[0]))


@dataclass(frozen=True)
class Part:
    """A contiguous range of a global axis, and where it begins in the local one."""

    range: Range
    local: int


def seat_coordinates(layout: Sharding, seat: int) -> tuple[int, ...]:
    """Return the place of a seat along every axis of the mesh."""
    coordinates = []
    for extent in reversed(layout.mesh):
        seat, place = divmod(seat, extent)
        coordinates.append(place)
    return tuple(reversed(coordinates))


def cut_coordinates(layout: Sharding, seat: int) -> tuple[int, ...]:
    """Return the same with 0 for axes that cut nothing: seats that hold the same have the same."""
    return tuple(
        place if cut is not None else 0
        for place, cut in zip(seat_coordinates(layout, seat), layout.cuts, strict=True)
    )


@functools.cache
def seats_by_content(layout: Sharding) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Return the seats that hold the same, by their `cut_coordinates`."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for seat in range(len(layout.ranks)):
        alike.setdefault(cut_coordinates(layout, seat), []).append(seat)
    return {content: tuple(seats) for content, seats in alike.items()}


def local_parts(layout: Sharding, coordinates: tuple[int, ...]) -> tuple[tuple[Part, ...], ...]:
    """Return, for every axis of the stored tensor, which ranges a seat holds, in local order."""
    ranges: list[list[Range]] = [[(0, size)] for size in layout.shape]
    for place, extent, cut in zip(coordinates, layout.mesh, layout.cuts, strict=True):
        if cut is not None:
            ranges[cut.axis] = _share(ranges[cut.axis], extent, place, cut.factor)
    return tuple(tuple(_located(axis)) for axis in ranges)


def local_shape(layout: Sharding, seat: int) -> tuple[int, ...]:
    """Return the shape of a seat's local tensor."""
    parts = local_parts(layout, cut_coordinates(layout, seat))
    return tuple(sum(_length(part.range) for part in axis) for axis in parts)


def element_numbers(layout: Sharding, coordinates: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where every element of a seat's local tensor is in the whole stored one.

    Returns:
        int32, shape of the local tensor; counted along the last axis first, wrapping.
    """
    numbers = torch.zeros((), dtype=torch.int32, device=device)
    for size, parts in zip(layout.shape, local_parts(layout, coordinates), strict=True):
        indices = [numbers.new_empty(0)]
        indices += [torch.arange(*part.range, dtype=torch.int32, device=device) for part in parts]
        numbers = numbers.unsqueeze(-1) * size + torch.cat(indices)
    return numbers


def _length(r: Range) -> int:
    return r[1] - r[0]


def _share(ranges: list[Range], ways: int, place: int, factor: int) -> list[Range]:
    """Return what is left of concatenated `ranges` for one of `ways`, as torch.chunk divides."""
    kept: list[Range] = []
    length = sum(map(_length, ranges))
    for number in range(factor):
        kept += _slice(ranges, *_chunk(_chunk((0, length), factor, number), ways, place))
    return kept


def _chunk(r: Range, number: int, place: int) -> Range:
    start, stop = r
    size = -(-(stop - start) // number)
    return min(start + place * size, stop), min(start + (place + 1) * size, stop)


def _slice(ranges: list[Range], start: int, stop: int) -> list[Range]:
    kept = []
    passed = 0
    for first, last in ranges:
        low, high = max(start - passed, 0), min(stop - passed, last - first)
        if low < high:
            kept.append((first + low, first + high))
        passed += last - first
    return kept


def _located(ranges: list[Range]) -> Iterator[Part]:
    """Join what is contiguous, and say where each range begins in the local tensor."""
    passed = 0
    joined: list[Range] = []
    for r in ranges:
        if joined and joined[-1][1] == r[0]:
            joined[-1] = (joined[-1][0], r[1])
        else:
            joined.append(r)
    for r in joined:
        yield Part(r, passed)
        passed += _length(r)


@functools.cache
def pieces(layout: Sharding, coordinates: tuple[int, ...]) -> tuple[Piece, ...]:
    """Return the pieces of a seat with these `cut_coordinates`, in the order of their matrices.

    Raises:
        LayoutError: where the kernel of a convolution is cut.
    """
    leading, outs, ins = _three_axes(layout, local_parts(layout, coordinates))
    _, out, in_ = stack_shape(layout.shape, layout.matrices)
    found = [
        Piece(matrix, rows, columns, place, comb)
        for matrix, stack, rows_of, columns_of in _stored_matrices(layout, out, in_)
        if stack in leading
        for part, column_part in itertools.product(outs, ins)
        if (rows := rows_of.within(part.range))[0] < rows[1]
        and (columns := columns_of.within(column_part.range))[0] < columns[1]
        for place, comb in [
            _place(leading[stack], part, rows_of, rows, column_part, columns_of, columns)
        ]
    ]
    return tuple(found)


@functools.cache
def pieces_by_matrix(layout: Sharding, coordinates: tuple[int, ...]) -> dict[int, list[Piece]]:
    """Return `pieces` by the number of their matrix."""
    found: defaultdict[int, list[Piece]] = defaultdict(list)
    for piece in pieces(layout, coordinates):
        found[piece.matrix].append(piece)
    return dict(found)


@dataclass(frozen=True)
class _Comb:
    """Which indices of an axis belong to a matrix: `share` of every `stride`, from `first` on."""

    first: int
    share: int
    stride: int
    skipped: int
    """Indices of the split before those of this matrix (a head's)."""
    length: int

    def within(self, r: Range) -> Range:
        """Return which of the matrix's own indices lie in `r`."""
        low, high = (self._before(end) - self.skipped for end in r)
        return max(low, 0), min(high, self.length)

    def _before(self, index: int) -> int:
        full, rest = divmod(index, self.stride)
        return full * self.share + min(max(rest - self.first, 0), self.share)

    def index(self, own: int) -> int:
        """Return where an index of the matrix is on the axis."""
        full, rest = divmod(own + self.skipped, self.share)
        return full * self.stride + self.first + rest

    @property
    def together(self) -> bool:
        return self.share == self.stride or self.skipped + self.length <= self.share


def _stored_matrices(
    layout: Sharding, out: int, in_: int
) -> Iterator[tuple[int, int, _Comb, _Comb]]:
    """Yield (matrix, leading index, rows, columns), in the order of `view`."""
    stored = layout.matrices
    shapes = matrix_shapes(layout.shape, stored)
    splits = stored.splits or (out,)
    heads = heads_of(stored, len(splits), layout.shape)
    first, matrix = 0, 0
    for (number, rows, columns), split, count in zip(shapes, splits, heads, strict=True):
        share = split // stored.groups
        for each in range(number):
            stack, head = divmod(each, count)
            by_rows, by_columns = (0, head) if stored.by_columns else (head, 0)
            if share:
                yield (
                    matrix,
                    stack,
                    _Comb(first, share, out // stored.groups, by_rows * rows, rows),
                    _Comb(0, in_, in_, by_columns * columns, columns),
                )
            matrix += 1
        first += share


def _place(
    leading: int,
    part: Part,
    rows_of: _Comb,
    rows: Range,
    column_part: Part,
    columns_of: _Comb,
    columns: Range,
) -> tuple[tuple[int, int, int], tuple[int, int, int] | None]:
    row = rows_of.index(rows[0]) - part.range[0] + part.local
    column = columns_of.index(columns[0]) - column_part.range[0] + column_part.local
    if rows_of.together:
        return (leading, row, column), None
    # Rows count from the split's first, and its rows from where the local tensor begins.
    comb = rows_of.first - part.range[0] + part.local, rows_of.share, rows_of.stride
    return (leading, rows_of.skipped, column), comb


def _three_axes(
    layout: Sharding, parts: tuple[tuple[Part, ...], ...]
) -> tuple[dict[int, int], tuple[Part, ...], tuple[Part, ...]]:
    """Return local by global leading index, and the parts of the axes `out` and `in`."""
    stored, shape = layout.matrices, layout.shape
    if stored.flattened:
        leading = {0: 0}
        kernel = math.prod(shape[2:])
        if any(
            len(axis) != 1 or axis[0].range != (0, n)
            for axis, n in zip(parts[2:], shape[2:], strict=True)
        ):
            raise LayoutError(
                f"the kernel of a convolution of shape {shape} is cut: {layout.cuts}"
                "; shard it by its first axis, or leave it whole on every rank, which must hold all of a kernel"
            )
        a = parts[0]
        b = tuple(
            Part((p.range[0] * kernel, p.range[1] * kernel), p.local * kernel) for p in parts[1]
        )
    else:
        sizes, axes = shape[:-2], parts[:-2]
        held = [[range(*p.range) for p in axis] for axis in axes]
        flat = [list(itertools.chain.from_iterable(axis)) for axis in held]
        leading = {
            _ravel(index, sizes): number for number, index in enumerate(itertools.product(*flat))
        }
        a, b = parts[-2], parts[-1]
    return (leading, b, a) if stored.transposed else (leading, a, b)


def _ravel(index: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    flat = 0
    for i, size in zip(index, sizes, strict=True):
        flat = flat * size + i
    return flat


def read_piece(local: Tensor, matrices: MatrixSpec, piece: Piece) -> Tensor:
    """Return a piece `[rows, columns]` of a local tensor, a view where the rows lie together."""
    X_NMK, rows, columns = _window(local, matrices, piece)
    return X_NMK[piece.place[0], rows, columns]


def write_piece_(local: Tensor, matrices: MatrixSpec, piece: Piece, values: Tensor) -> None:
    """Write a piece `[rows, columns]` into a local tensor, contiguous where it is flattened."""
    X_NMK, rows, columns = _window(local, matrices, piece)
    X_NMK[piece.place[0], rows, columns] = values.to(local.dtype)


def _window(
    local: Tensor, matrices: MatrixSpec, piece: Piece
) -> tuple[Tensor, slice | Tensor, slice]:
    (row_count, column_count), (_, row, column) = piece.shape, piece.place
    columns = slice(column, column + column_count)
    if piece.comb is None:
        return stacked(local, matrices), slice(row, row + row_count), columns
    first, share, stride = piece.comb
    r = torch.arange(piece.rows[0], piece.rows[1], device=local.device) + row
    return stacked(local, matrices), r // share * stride + first + r % share, columns
