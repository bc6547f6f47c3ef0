"""Which part of each logical matrix is on which rank.

A parameter is sharded over a mesh of ranks. Each axis of the mesh either divides an axis of the
stored tensor or replicates it. This determines the *pieces* that a rank holds: (matrix, rows,
columns) boxes of the logical matrices, however a `MatrixSpec` stores them: transposed, interleaved
or stacked.

A *mesh rank* is the index of a rank in the flattened mesh. A *shard coordinate* is its coordinate
along the axes that divide the tensor; mesh ranks with the same shard coordinate are *replicas*.
Ranges are `(start, stop)`.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muonscale.errors import LayoutError
from muonscale.optim.matrices.spec import (
    PLAIN,
    MatrixSpec,
    batch_shape,
    heads_of,
    matrix_shapes,
    to_batch,
)

Range = tuple[int, int]
_Pattern = tuple[int, int, int]


@dataclass(frozen=True)
class Cut:
    """How one axis of a mesh divides an axis of the stored tensor, in chunks as of torch.chunk."""

    axis: int
    factor: int = 1
    """Number of chunks into which later axes of the mesh divide the axis before this one does, as
    `split_factor` of `_StridedShard` says of FSDP over tensor parallelism. If no later axes give
    this number, the axis is divided into this many blocks and each of them into chunks."""


@dataclass(frozen=True)
class Sharding:
    """How a parameter is sharded over a device mesh. By default it is whole on one rank."""

    shape: tuple[int, ...]
    """Shape of the full stored tensor."""
    matrices: MatrixSpec = PLAIN
    mesh: tuple[int, ...] = (1,)
    """Shape of the mesh."""
    cuts: tuple[Cut | None, ...] = (None,)
    """How each axis of the mesh divides the tensor; None if it replicates it."""
    ranks: tuple[int, ...] = (0,)
    """Global rank of each mesh rank."""
    partitioned: bool = False
    """Whether state is partitioned (ZeRO-1): that of a matrix is whole on the rank that updates it.
    Otherwise state is sharded as the parameter is."""

    def __hash__(self) -> int:
        """Return a cached hash: shardings are keys of caches, and `ranks` may be long."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.matrices, self.mesh, self.cuts, self.ranks, self.partitioned))

    def __reduce__(self) -> tuple[type[Sharding], tuple[object, ...]]:
        """Pickle without the cached hash, which another process computes differently."""
        return Sharding, (
            self.shape,
            self.matrices,
            self.mesh,
            self.cuts,
            self.ranks,
            self.partitioned,
        )

    @property
    def replicated(self) -> bool:
        """Whether every rank holds the full tensor."""
        return all(cut is None for cut in self.cuts)

    @property
    def copies(self) -> int:
        """Number of ranks that hold each element."""
        return math.prod(n for n, cut in zip(self.mesh, self.cuts, strict=True) if cut is None)


@dataclass(frozen=True)
class Piece:
    """A box of one logical matrix, and its place in the local tensor."""

    matrix: int
    """Index of the matrix in the parameter, in the order of `spec.view`: split, leading, head."""
    rows: Range
    columns: Range
    place: tuple[int, int, int]
    """Leading index, first row and first column in the local tensor as `[leading, out, in]`."""
    stride_pattern: _Pattern | None = None
    """(first, share, stride) of interleaved rows: row r of the split is stored at
    `r // share * stride + first + r % share`. None if the rows are consecutive."""
    column_pattern: _Pattern | None = None
    """The same of interleaved columns."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the piece."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def elements(self) -> int:
        """Number of elements of the piece."""
        return math.prod(self.shape)


def intersect(piece: Piece, rows: Range, columns: Range) -> Piece | None:
    """Return the part of a piece in a window of its matrix, or None if it is empty."""
    r = max(piece.rows[0], rows[0]), min(piece.rows[1], rows[1])
    c = max(piece.columns[0], columns[0]), min(piece.columns[1], columns[1])
    if r[0] >= r[1] or c[0] >= c[1]:
        return None
    leading, row, column = piece.place
    if piece.stride_pattern is None:  # otherwise rows are found by their index
        row += r[0] - piece.rows[0]
    if piece.column_pattern is None:
        column += c[0] - piece.columns[0]
    return replace(piece, rows=r, columns=c, place=(leading, row, column))


@dataclass(frozen=True)
class Part:
    """A contiguous range of a global axis, and its start on the local axis."""

    range: Range
    local: int


def unravel(index: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the coordinates of a flat index in an array of these sizes."""
    coordinates = []
    for size in reversed(sizes):
        index, coordinate = divmod(index, size)
        coordinates.append(coordinate)
    return tuple(reversed(coordinates))


def shard_coordinates(sharding: Sharding, mesh_rank: int) -> tuple[int, ...]:
    """Return the mesh coordinate with 0 for axes that replicate: replicas have the same one."""
    return tuple(
        place if cut is not None else 0
        for place, cut in zip(unravel(mesh_rank, sharding.mesh), sharding.cuts, strict=True)
    )


@functools.cache
def replicas_by_coord(sharding: Sharding) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Return the mesh ranks that are replicas of each other, by their `shard_coordinates`."""
    replicas: dict[tuple[int, ...], list[int]] = {}
    for mesh_rank in range(len(sharding.ranks)):
        replicas.setdefault(shard_coordinates(sharding, mesh_rank), []).append(mesh_rank)
    return {coord: tuple(mesh_ranks) for coord, mesh_ranks in replicas.items()}


def local_parts(sharding: Sharding, shard_coord: tuple[int, ...]) -> tuple[tuple[Part, ...], ...]:
    """Return the ranges of each axis of the stored tensor that a shard holds, in local order."""
    ranges: list[list[Range]] = [[(0, size)] for size in sharding.shape]
    for mesh_axis, factor in _order_of_cuts(sharding.mesh, sharding.cuts):
        cut = sharding.cuts[mesh_axis]
        assert cut is not None
        ranges[cut.axis] = _chunk_ranges(
            ranges[cut.axis], sharding.mesh[mesh_axis], shard_coord[mesh_axis], factor
        )
    return tuple(tuple(_add_local_starts(axis)) for axis in ranges)


@functools.cache
def _order_of_cuts(
    mesh: tuple[int, ...], cuts: tuple[Cut | None, ...]
) -> tuple[tuple[int, int], ...]:
    """Return (mesh axis, number of blocks each of which it divides), in the order of division.

    FSDP divides the chunks of tensor parallelism. Where the ranks do not divide the rows, this is
    not what torch's `compute_local_shape_and_global_offset` says, but what `full_tensor` undoes.
    """
    orders: defaultdict[int, list[int]] = defaultdict(list)
    divided = [(mesh_axis, cut) for mesh_axis, cut in enumerate(cuts) if cut is not None]
    for mesh_axis, cut in reversed(divided):
        order = orders[cut.axis]
        blocks = [1, *itertools.accumulate((mesh[axis] for axis in order), operator.mul)]
        if cut.factor not in blocks:
            return tuple((mesh_axis, cut.factor) for mesh_axis, cut in divided)
        order.insert(blocks.index(cut.factor), mesh_axis)
    return tuple((mesh_axis, 1) for order in orders.values() for mesh_axis in order)


def local_shape(sharding: Sharding, mesh_rank: int) -> tuple[int, ...]:
    """Return the shape of the local tensor of a mesh rank."""
    parts = local_parts(sharding, shard_coordinates(sharding, mesh_rank))
    return tuple(sum(_length(part.range) for part in axis) for axis in parts)


def element_numbers(
    sharding: Sharding, shard_coord: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return the flat index of each element of a local tensor in the full stored tensor.

    Returns:
        int32 with the shape of the local tensor; large indices wrap.
    """
    numbers = torch.zeros((), dtype=torch.int32, device=device)
    for size, parts in zip(sharding.shape, local_parts(sharding, shard_coord), strict=True):
        indices = [numbers.new_empty(0)]
        indices += [torch.arange(*part.range, dtype=torch.int32, device=device) for part in parts]
        numbers = numbers.unsqueeze(-1) * size + torch.cat(indices)
    return numbers


def _length(r: Range) -> int:
    return r[1] - r[0]


def _chunk_ranges(ranges: list[Range], ways: int, place: int, factor: int) -> list[Range]:
    """Return the chunk at `place` of `ways` of the concatenated `ranges`, as of torch.chunk."""
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


def _add_local_starts(ranges: list[Range]) -> Iterator[Part]:
    """Merge contiguous ranges, and yield each with its start in the local tensor."""
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
def pieces(sharding: Sharding, shard_coord: tuple[int, ...]) -> tuple[Piece, ...]:
    """Return the pieces of the shard with these `shard_coordinates`, sorted by matrix.

    Raises:
        LayoutError: if the kernel of a convolution is sharded.
    """
    leading, outs, ins = _three_axes(sharding, local_parts(sharding, shard_coord))
    _, out, in_ = batch_shape(sharding.shape, sharding.matrices)
    found = [
        Piece(matrix, rows, columns, place, *patterns)
        for matrix, index, rows_of, columns_of in _stored_matrices(sharding, out, in_)
        if index in leading
        for part, column_part in itertools.product(outs, ins)
        if (rows := rows_of.clip(part.range))[0] < rows[1]
        and (columns := columns_of.clip(column_part.range))[0] < columns[1]
        for place, patterns in [
            _place(leading[index], part, rows_of, rows, column_part, columns_of, columns)
        ]
    ]
    return tuple(found)


@functools.cache
def pieces_by_matrix(sharding: Sharding, shard_coord: tuple[int, ...]) -> dict[int, list[Piece]]:
    """Return `pieces` by matrix."""
    found: defaultdict[int, list[Piece]] = defaultdict(list)
    for piece in pieces(sharding, shard_coord):
        found[piece.matrix].append(piece)
    return dict(found)


@dataclass(frozen=True)
class _StridePattern:
    """Indices of an axis that belong to a matrix: `share` of every `stride`, from `first` on."""

    first: int
    share: int
    stride: int
    skipped: int
    """Number of indices of the split before this matrix, which is then a head."""
    length: int

    def clip(self, r: Range) -> Range:
        """Return the indices of the matrix that the range `r` of the axis contains."""
        low, high = (self._count_before(end) - self.skipped for end in r)
        return max(low, 0), min(high, self.length)

    def _count_before(self, index: int) -> int:
        full, rest = divmod(index, self.stride)
        return full * self.share + min(max(rest - self.first, 0), self.share)

    def axis_index(self, own: int) -> int:
        """Return the index on the axis of an index of the matrix."""
        full, rest = divmod(own + self.skipped, self.share)
        return full * self.stride + self.first + rest

    @property
    def consecutive(self) -> bool:
        return self.share == self.stride or self.skipped + self.length <= self.share


def _stored_matrices(
    sharding: Sharding, out: int, in_: int
) -> Iterator[tuple[int, int, _StridePattern, _StridePattern]]:
    """Yield (matrix, leading index, rows, columns), in the order of `view`."""
    spec = sharding.matrices
    shapes = matrix_shapes(sharding.shape, spec)
    splits = spec.splits or (out,)
    heads = heads_of(spec, len(splits), sharding.shape)
    first, matrix = 0, 0
    for (number, rows, columns), split, count in zip(shapes, splits, heads, strict=True):
        share = split // spec.groups
        for each in range(number):
            index, head = divmod(each, count)
            by_rows, by_columns = (0, head) if spec.by_columns else (head, 0)
            columns_of = _StridePattern(0, in_, in_, by_columns * columns, columns)
            if spec.interleaved:
                columns_of = _StridePattern(head, 1, count, 0, columns)
            if share:
                yield (
                    matrix,
                    index,
                    _StridePattern(first, share, out // spec.groups, by_rows * rows, rows),
                    columns_of,
                )
            matrix += 1
        first += share


def _place(
    leading: int,
    part: Part,
    rows_of: _StridePattern,
    rows: Range,
    column_part: Part,
    columns_of: _StridePattern,
    columns: Range,
) -> tuple[tuple[int, int, int], tuple[_Pattern | None, _Pattern | None]]:
    row, row_pattern = _place_on_axis(part, rows_of, rows[0])
    column, column_pattern = _place_on_axis(column_part, columns_of, columns[0])
    return (leading, row, column), (row_pattern, column_pattern)


def _place_on_axis(part: Part, indices: _StridePattern, own: int) -> tuple[int, _Pattern | None]:
    start = part.local - part.range[0]
    if indices.consecutive:
        return indices.axis_index(own) + start, None
    # Indices are relative to the first of the split, and `first` to the start of the local tensor.
    return indices.skipped, (indices.first + start, indices.share, indices.stride)


def _three_axes(
    sharding: Sharding, parts: tuple[tuple[Part, ...], ...]
) -> tuple[dict[int, int], tuple[Part, ...], tuple[Part, ...]]:
    """Return the local index of each global leading index, and the parts of `out` and `in`."""
    spec, shape = sharding.matrices, sharding.shape
    if spec.flattened:
        leading = {0: 0}
        kernel = math.prod(shape[2:])
        if any(
            len(axis) != 1 or axis[0].range != (0, n)
            for axis, n in zip(parts[2:], shape[2:], strict=True)
        ):
            raise LayoutError(
                f"the kernel of a convolution of shape {shape} is sharded: {sharding.cuts}. Shard the "
                "first or second axis instead, or replicate the parameter"
            )
        a = parts[0]
        b = tuple(
            Part((p.range[0] * kernel, p.range[1] * kernel), p.local * kernel) for p in parts[1]
        )
    else:
        sizes, axes = shape[:-2], parts[:-2]
        flat = [[i for p in axis for i in range(*p.range)] for axis in axes]
        leading = {
            _ravel(index, sizes): number for number, index in enumerate(itertools.product(*flat))
        }
        a, b = parts[-2], parts[-1]
    return (leading, b, a) if spec.transposed else (leading, a, b)


def _ravel(index: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    flat = 0
    for i, size in zip(index, sizes, strict=True):
        flat = flat * size + i
    return flat


def read_piece(local: Tensor, matrices: MatrixSpec, piece: Piece) -> Tensor:
    """Return a piece `[rows, columns]` of a local tensor; a view if both are consecutive."""
    X_NMK, rows, columns = _window(local, matrices, piece)
    return X_NMK[piece.place[0], rows, columns]


def write_piece_(local: Tensor, matrices: MatrixSpec, piece: Piece, values: Tensor) -> None:
    """Write a piece `[rows, columns]` into a local tensor, which is contiguous if flattened."""
    X_NMK, rows, columns = _window(local, matrices, piece)
    X_NMK[piece.place[0], rows, columns] = values.to(local.dtype)


def _window(
    local: Tensor, matrices: MatrixSpec, piece: Piece
) -> tuple[Tensor, slice | Tensor, slice | Tensor]:
    _, row, column = piece.place
    rows = _indices(piece.rows, row, piece.stride_pattern, local.device)
    columns = _indices(piece.columns, column, piece.column_pattern, local.device)
    if isinstance(rows, Tensor) and isinstance(columns, Tensor):
        rows = rows.unsqueeze(1)
    return to_batch(local, matrices), rows, columns


def _indices(
    own: Range, place: int, pattern: _Pattern | None, device: torch.device
) -> slice | Tensor:
    if pattern is None:
        return slice(place, place + _length(own))
    first, share, stride = pattern
    index = torch.arange(*own, device=device) + place
    return index // share * stride + first + index % share
