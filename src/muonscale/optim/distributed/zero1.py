"""ZeRO-1: the state of a replicated parameter, partitioned over the ranks that own its matrices.

Under plain data parallelism each rank keeps, updates and saves the state of the matrices that it
owns. A `PartitionedTensor` takes the place of the full tensor in the state. It has the shape of the
full tensor and the values of this rank's part. `torch.distributed.checkpoint` saves it as boxes of
the full tensor, which can be loaded with any other sharding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.errors import CheckpointError
from muonscale.optim.distributed.assignment import shapes_of
from muonscale.optim.distributed.dtensor import gather_full, is_sharded, redistribute_like, to_local
from muonscale.optim.matrices.sharding import (
    Piece,
    Sharding,
    pieces,
    read_piece,
    unravel,
    write_piece_,
)
from muonscale.optim.matrices.spec import MatrixSpec

if TYPE_CHECKING:  # importing them takes seconds, and a single process needs none of them
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

WHOLE_BELOW = 2**16
"""Elements below which one rank owns all of a parameter on AdamW: splitting would cost more."""


class PartitionedTensor(Tensor):
    """The part of a full tensor that this rank owns. No operation takes it as an operand."""

    parts: dict[int, Tensor]
    """`[out, in]` of each matrix that this rank owns."""
    sharding: Sharding
    """Sharding of the full tensor; it is `partitioned`."""
    staged: bool = False
    """Whether it is a copy that `torch.distributed.checkpoint.async_save` writes: such a copy may
    go to another process."""

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], sharding: Sharding, parts: Mapping[int, Tensor], like: Tensor
    ) -> PartitionedTensor:
        """Return a tensor of `shape`, with the dtype and device of `like`."""
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        self.parts = dict(parts)
        self.sharding = sharding
        return self

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Return the full shape, and the number of elements on this rank."""
        here = sum(part.numel() for part in self.parts.values())
        return (
            f"PartitionedTensor(shape={tuple(self.shape)}, {here} of {self.numel()} elements here)"
        )

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore [bad-override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return the tensor itself for detach and alias, and refuse all other operations.

        `async_save` makes a copy with new_empty, and then copies the attributes.
        """
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        if func is torch.ops.aten.new_empty.default and tuple(args[1]) == tuple(args[0].shape):
            like = torch.empty(0, dtype=args[0].dtype, device=(kwargs or {}).get("device"))
            copy = PartitionedTensor(tuple(args[1]), args[0].sharding, {}, like)
            copy.staged = True
            return copy
        raise CheckpointError(
            f"{func} was called on a partitioned tensor of the optimizer state. {_ADVICE}"
        )

    def __reduce_ex__(self, proto: Any) -> Any:
        """Refuse to be pickled unless it is staged: the file would lack the parts of other ranks."""
        if self.staged:
            return _rebuild, (tuple(self.shape), self.sharding, self.parts, self.dtype)
        raise CheckpointError(
            f"{self!r} cannot be pickled: this rank has only a part of the optimizer state. {_ADVICE}"
        )

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """Return what torch.distributed.checkpoint writes from this rank."""
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import (
            TensorWriteData,
            WriteItem,
            WriteItemType,
        )

        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(values),
                    size=self.shape,
                ),
            )
            for chunk, values in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return what torch.distributed.checkpoint reads on this rank."""
        return [chunk for chunk, _ in self._chunks()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Return the view that a chunk is read into or written from."""
        for chunk, values in self._chunks():
            if chunk.offsets == index.offset:
                return values
        raise CheckpointError(f"{index} is not on this rank. {_ADVICE}")

    def _chunks(self) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        """Yield the boxes of the full tensor that are on this rank, with views of their values."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        for piece, part in self.iter_pieces():
            for (offsets, sizes), rows, columns in stored_boxes(self.sharding, piece):
                values = part[rows, columns]
                values = values.mT if self.sharding.matrices.transposed else values
                chunk = ChunkStorageMetadata(
                    torch.Size(offsets[: self.ndim]), torch.Size(sizes[: self.ndim])
                )
                yield chunk, values.view(chunk.sizes)

    def iter_pieces(self) -> Iterator[tuple[Piece, Tensor]]:
        """Yield each matrix on this rank, with its piece of the full tensor."""
        for piece in pieces(self.sharding, (0,)):
            if piece.matrix in self.parts:
                yield piece, self.parts[piece.matrix]


def _rebuild(
    shape: tuple[int, ...], sharding: Sharding, parts: Mapping[int, Tensor], dtype: torch.dtype
) -> PartitionedTensor:
    return PartitionedTensor(shape, sharding, parts, torch.empty(0, dtype=dtype))


OwnedMatrices = tuple[Sharding, tuple[int, ...]]
"""Sharding of a parameter's partitioned state, and the matrices that this rank owns."""


def partitioned_zeros(
    shape: tuple[int, ...], owned: OwnedMatrices, dtype: torch.dtype, device: torch.device
) -> PartitionedTensor:
    """Return a partitioned state tensor of zeros, with the full `shape`."""
    sharding, matrices = owned
    shapes = shapes_of(sharding)
    like = torch.empty(0, dtype=dtype, device=device)
    return PartitionedTensor(
        shape, sharding, {m: like.new_zeros(shapes[m]) for m in matrices}, like
    )


def copy_(target: Tensor, source: Tensor) -> None:
    """Copy state between full, sharded and partitioned tensors.

    A collective if a sharded source has other placements than the target.

    Raises:
        CheckpointError: if the source is partitioned, and the target is not or in another way.
    """
    if isinstance(source, PartitionedTensor):
        if not isinstance(target, PartitionedTensor) or source.parts.keys() != target.parts.keys():
            raise CheckpointError(
                f"{source!r} cannot be copied to other optimizer state of shape "
                f"{tuple(target.shape)}: it is partitioned over the ranks differently. {_ADVICE}"
            )
        for number, part in target.parts.items():
            part.copy_(source.parts[number])
        return
    if is_sharded(target):
        to_local(target).copy_(to_local(redistribute_like(source, target)))
        return
    whole = gather_full(source)
    if isinstance(target, PartitionedTensor):
        sharding = target.sharding
        for piece, part in target.iter_pieces():
            part.copy_(read_piece(whole.reshape(sharding.shape), sharding.matrices, piece))
    else:
        target.copy_(whole)


def scale_(target: Tensor, factor: float) -> None:
    """Multiply a full, sharded or partitioned state tensor by `factor`."""
    if isinstance(target, PartitionedTensor):
        for part in target.parts.values():
            part.mul_(factor)
    else:
        to_local(target).mul_(factor)


def gather(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the full state tensor on every rank. A collective of the ranks that share it."""
    if not isinstance(value, PartitionedTensor):
        return gather_full(value)
    whole = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    for piece, part in value.iter_pieces():
        write_piece_(whole.view(value.sharding.shape), value.sharding.matrices, piece, part)
    dist.all_reduce(whole, group=group)
    return whole


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a block of a tensor, one number for each axis."""


def stored_boxes(sharding: Sharding, piece: Piece) -> Iterator[tuple[Box, slice, slice]]:
    """Yield the boxes of the stored tensor that hold a matrix, each with its rows and columns.

    Args:
        sharding: sharding of a replicated tensor.
        piece: piece that covers a whole matrix of it.
    """
    shape, matrices = sharding.shape, sharding.matrices
    leading, first_row, first_column = piece.place
    row_runs = _runs(piece.rows, first_row, piece.stride_pattern)
    column_runs = list(_runs(piece.columns, first_column, piece.column_pattern))
    for (row, rows), (column, columns) in itertools.product(row_runs, column_runs):
        spans = [
            (row, row + rows.stop - rows.start),
            (column, column + columns.stop - columns.start),
        ]
        if matrices.transposed:
            spans.reverse()
        first, second = spans
        if not matrices.flattened:
            coordinates = unravel(leading, shape[:-2])
            offsets = (*coordinates, first[0], second[0])
            ones = [1] * len(coordinates)
            sizes = (*ones, first[1] - first[0], second[1] - second[0])
            yield (offsets, sizes), rows, columns
            continue
        for start, (offsets, sizes) in _boxes_of_range(*second, shape[1:]):
            box = (first[0], *offsets), (first[1] - first[0], *sizes)
            along = rows if matrices.transposed else columns
            at = along.start + start - second[0]
            part = slice(at, at + math.prod(sizes))
            yield (box, part, columns) if matrices.transposed else (box, rows, part)


def _boxes_of_range(start: int, stop: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, Box]]:
    """Yield (first flat index, box) of boxes that together are a range of a tensor's flat indices."""
    if len(sizes) == 1:
        yield start, ((start,), (stop - start,))
        return
    inner = math.prod(sizes[1:])
    while start < stop:
        index, rest = divmod(start, inner)
        whole = (stop - start) // inner
        if rest == 0 and whole:
            yield start, ((index, *[0] * len(sizes[1:])), (whole, *sizes[1:]))
            start += whole * inner
            continue
        end = min(stop, (index + 1) * inner)
        for flat, (offsets, lengths) in _boxes_of_range(rest, rest + end - start, sizes[1:]):
            yield index * inner + flat, ((index, *offsets), (1, *lengths))
        start = end


def _runs(
    own: tuple[int, int], place: int, pattern: tuple[int, int, int] | None
) -> Iterator[tuple[int, slice]]:
    """Yield (first stored index, indices of the matrix) for each run of consecutive stored indices."""
    if pattern is None:
        yield place, slice(*own)
        return
    first, share, stride = pattern
    index = own[0]
    while index < own[1]:
        group, rest = divmod(index + place, share)
        stop = min(own[1], index + share - rest)
        yield group * stride + first + rest, slice(index, stop)
        index = stop


def rows_sharding(shape: tuple[int, ...], ranks: tuple[int, ...]) -> Sharding:
    """Return the sharding of partitioned AdamW state: by rows, or whole if it is small."""
    as_matrix = shape if len(shape) > 1 else (math.prod(shape), 1)
    rows = as_matrix[0]
    each = rows if math.prod(shape) < WHOLE_BELOW else -(-rows // len(ranks))
    splits = tuple(min(each, rows - start) for start in range(0, rows, max(1, each)))
    matrices = MatrixSpec(flattened=True, splits=splits)
    return Sharding(as_matrix, matrices, (len(ranks),), (None,), ranks, partitioned=True)


_ADVICE = (
    "Save and load it on all ranks with torch.distributed.checkpoint, or call "
    "optimizer.full_state_dict() on all ranks and save what it returns on one"
)
