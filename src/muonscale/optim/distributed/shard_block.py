"""Shards of FSDP over tensor parallelism in `torch.distributed.checkpoint`.

torch computes the place of a shard from its placements, which is wrong if the ranks do not divide
the rows: FSDP holds chunks of chunks (`muonscale.optim.matrices.sharding`). It refuses to save such
a tensor. A `ShardBlock` says where its values are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from muonscale.errors import CheckpointError
from muonscale.optim.distributed.dtensor import check_local_shape, is_sharded, sharding_of
from muonscale.optim.matrices.sharding import local_parts, shard_coordinates
from muonscale.optim.matrices.spec import PLAIN

if TYPE_CHECKING:  # importing them takes seconds, and a single process needs none of them
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


class ShardBlock(Tensor):
    """The values of a DTensor on this rank, and the offsets of the block of the tensor they are."""

    local: Tensor
    offsets: tuple[int, ...]

    @staticmethod
    def __new__(cls, tensor: Any) -> ShardBlock:
        """Return the block of a DTensor; it shares its memory.

        Raises:
            CheckpointError: if the values on this rank are no block of the tensor.
        """
        self = Tensor._make_wrapper_subclass(
            cls, tensor.shape, dtype=tensor.dtype, device=tensor.device
        )
        sharding = sharding_of("a tensor", tensor, PLAIN)
        assert sharding is not None
        check_local_shape("a tensor", tensor, sharding)
        mesh_rank = sharding.ranks.index(dist.get_rank())
        parts = local_parts(sharding, shard_coordinates(sharding, mesh_rank))
        self.local = tensor.to_local().detach()
        if self.local.numel() and any(len(axis) != 1 for axis in parts):
            raise CheckpointError(
                f"a tensor with placements {tensor.placements} cannot be saved: this rank holds "
                "several blocks of it. Shard it with fully_shard and parallelize_module"
            )
        self.offsets = tuple(axis[0].range[0] if axis else 0 for axis in parts)
        return self

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore [bad-override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse all operations: it is for saving and loading."""
        raise CheckpointError(f"{func} was called on a shard that is being saved or loaded")

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """Return what torch.distributed.checkpoint writes from this rank."""
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.local),
                    size=self.shape,
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return what torch.distributed.checkpoint reads on this rank."""
        from torch import Size
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        if not self.local.numel():
            return []
        return [ChunkStorageMetadata(Size(self.offsets), self.local.shape)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Return the values, which are read or written."""
        return self.local


def with_shard_blocks(tensors: Any) -> Any:
    """Return a nested state dict with a `ShardBlock` for each DTensor that needs one."""

    def convert(tensor: Any) -> Tensor:
        strided = is_sharded(tensor) and any(
            getattr(placement, "split_factor", 1) > 1
            for placement in tensor.placements  # pyrefly: ignore
        )
        return ShardBlock(tensor) if strided else tensor

    return tree_map_only(Tensor, convert, tensors)
