"""State of a parameter that all ranks hold whole, dealt out to the ranks that own its matrices.

This is ZeRO-1 under plain data parallelism: each rank keeps, moves and saves the state of its own
matrices. An `PartitionedTensor` stands in the state for the whole tensor, has its shape, and holds only
the part that is here. `torch.distributed.checkpoint` saves it in boxes of the stored tensor, so
that it can be loaded in any other layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.errors import CheckpointError
from muonscale.optim.distributed.assignment import shapes_of
from muonscale.optim.distributed.dtensor import gathered, is_sharded, local, placed_like
from muonscale.optim.matrices.sharding import Piece, Sharding, pieces, read_piece, write_piece_
from muonscale.optim.matrices.spec import MatrixSpec

if TYPE_CHECKING:  # they take seconds to import, and one process needs none of them
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

WHOLE_BELOW = 2**16
"""Elements below which a parameter on AdamW is not divided: a message per rank would cost more."""


class PartitionedTensor(Tensor):
    """The part of a replicated tensor that this rank owns; not an operand of anything."""

    parts: dict[int, Tensor]
    """`[out, in]` by number of the matrix."""
    dealt: Sharding
    """How the whole is dealt out."""

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], layout: Sharding, parts: Mapping[int, Tensor], like: Tensor
    ) -> PartitionedTensor:
        """Return the stand-in for a tensor of `shape`, in the dtype and on the device of `like`."""
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        self.parts = dict(parts)
        self.dealt = layout
        return self

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Return the shape of the whole and how much of it is here."""
        here = sum(part.numel() for part in self.parts.values())
        return (
            f"PartitionedTensor(shape={tuple(self.shape)}, {here} of {self.numel()} elements here)"
        )

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore [bad-override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Give itself where it is only passed on; refuse everything else."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise CheckpointError(f"{func} on a part of the optimizer state. {_ADVICE}")

    def __reduce_ex__(self, proto: Any) -> Any:
        """Refuse to be pickled: the file would lack what other ranks own."""
        raise CheckpointError(f"this rank has only a part of the optimizer state. {_ADVICE}")

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
        raise CheckpointError(f"{index} is not on this rank; {_ADVICE}")

    def _chunks(self) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        """Yield the boxes of the stored tensor that are here, with views of their values."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        for piece, part in self.owned():
            for offsets, sizes, rows in stored_boxes(self.dealt, piece):
                values = part[rows]
                values = values.mT if self.dealt.matrices.transposed else values
                chunk = ChunkStorageMetadata(
                    torch.Size(offsets[: self.ndim]), torch.Size(sizes[: self.ndim])
                )
                yield chunk, values.view(chunk.sizes)

    def take_(self, whole: Tensor) -> None:
        """Copy what of a whole tensor is owned here."""
        for piece, part in self.owned():
            matrices = self.dealt.matrices
            part.copy_(read_piece(whole.reshape(self.dealt.shape), matrices, piece))

    def give_(self, whole: Tensor) -> None:
        """Write what is owned here into a whole tensor, contiguous."""
        for piece, part in self.owned():
            write_piece_(whole.view(self.dealt.shape), self.dealt.matrices, piece, part)

    def owned(self) -> Iterator[tuple[Piece, Tensor]]:
        """Yield what is here, with where it is in the whole."""
        for piece in pieces(self.dealt, (0,)):
            if piece.matrix in self.parts:
                yield piece, self.parts[piece.matrix]


OwnedMatrices = tuple[Sharding, tuple[int, ...]]
"""How a replicated parameter's state is dealt out, and the numbers of the matrices that are here."""


def partitioned_zeros(
    shape: tuple[int, ...], owned: OwnedMatrices, dtype: torch.dtype, device: torch.device
) -> PartitionedTensor:
    """Return zeros for a state tensor of `shape`."""
    layout, here = owned
    shapes = shapes_of(layout)
    like = torch.empty(0, dtype=dtype, device=device)
    return PartitionedTensor(shape, layout, {m: like.new_zeros(shapes[m]) for m in here}, like)


def copy_(target: Tensor, source: Tensor) -> None:
    """Copy state from one layout into another: whole, sharded or owned.

    A collective where a sharded source has other placements than the target.

    Raises:
        CheckpointError: where the source is a part that is owned otherwise.
    """
    if isinstance(source, PartitionedTensor):
        if not isinstance(target, PartitionedTensor) or source.parts.keys() != target.parts.keys():
            raise CheckpointError(f"state is dealt out otherwise than it was. {_ADVICE}")
        for number, part in target.parts.items():
            part.copy_(source.parts[number])
        return
    if is_sharded(target):
        local(target).copy_(local(placed_like(source, target)))
        return
    whole = gathered(source)
    if isinstance(target, PartitionedTensor):
        target.take_(whole)
    else:
        target.copy_(whole)


def scale_(target: Tensor, factor: float) -> None:
    """Multiply state by `factor`, however it lies."""
    if isinstance(target, PartitionedTensor):
        for part in target.parts.values():
            part.mul_(factor)
    else:
        local(target).mul_(factor)


def gather(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the whole of a state tensor on every rank; a collective of those that share it."""
    if not isinstance(value, PartitionedTensor):
        return gathered(value)
    whole = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    value.give_(whole)
    dist.all_reduce(whole, group=group)
    return whole


def stored_boxes(
    layout: Sharding, piece: Piece
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], slice]]:
    """Yield (offsets, sizes) of the boxes of a whole matrix in the stored tensor, and their rows.

    Args:
        layout: of a tensor that is whole.
        piece: a whole matrix of it.
    """
    (leading, _, column), (_, columns) = piece.place, piece.shape
    for row, rows in _runs(piece):
        if layout.matrices.flattened and not layout.matrices.transposed:
            offsets = row, *[0] * (len(layout.shape) - 1)
            yield offsets, (rows.stop - rows.start, *layout.shape[1:]), rows
            continue
        if layout.matrices.flattened:
            yield (0,) * len(layout.shape), layout.shape, rows
            continue
        axes = [(row, rows.stop - rows.start), (column, columns)]
        if layout.matrices.transposed:
            axes.reverse()
        stack = _unravel(leading, layout.shape[:-2])
        yield (
            (*stack, *(start for start, _ in axes)),
            (*[1] * len(stack), *(length for _, length in axes)),
            rows,
        )


def _runs(piece: Piece) -> Iterator[tuple[int, slice]]:
    """Yield where each run of rows is stored, and which rows of the matrix they are."""
    if piece.comb is None:
        yield piece.place[1], slice(*piece.rows)
        return
    first, share, stride = piece.comb
    skipped = piece.place[1]
    row = piece.rows[0]
    while row < piece.rows[1]:
        group, rest = divmod(row + skipped, share)
        stop = min(piece.rows[1], row + share - rest)
        yield group * stride + first + rest, slice(row, stop)
        row = stop


def _unravel(index: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    places = []
    for size in reversed(sizes):
        index, place = divmod(index, size)
        places.append(place)
    return tuple(reversed(places))


def rows_sharding(shape: tuple[int, ...], ranks: tuple[int, ...]) -> Sharding:
    """Return how the AdamW state of a parameter is dealt out: as rows, or whole where it is small."""
    as_matrix = shape if len(shape) > 1 else (math.prod(shape), 1)
    rows = as_matrix[0]
    each = rows if math.prod(shape) < WHOLE_BELOW else -(-rows // len(ranks))
    splits = tuple(min(each, rows - start) for start in range(0, rows, max(1, each)))
    matrices = MatrixSpec(flattened=True, splits=splits)
    return Sharding(as_matrix, matrices, (len(ranks),), (None,), ranks, owned=True)


_ADVICE = (
    "Save and load it on all ranks with torch.distributed.checkpoint, or call "
    "optimizer.full_state_dict() on all ranks and save what it returns on one"
)
