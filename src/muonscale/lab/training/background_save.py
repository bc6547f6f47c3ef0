"""Checkpoints that are written in a thread while training goes on.

`torch.distributed.checkpoint.async_save` copies the state to the memory of the CPU, and writes the
copy in a thread: the checkpoint is the state at the moment of the call. When all ranks have written
their files, the next step completes it as `checkpoint.save_checkpoint` does; until then it has a
temporary name, and the one before it is the newest.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.checkpoint import CheckpointWriter
from muonscale.optim.distributed.shard_block import with_shard_blocks


class Stager(DefaultStager):
    """Copies tensors to the CPU before the call returns, as torch's does, and places their shards."""

    def __init__(self) -> None:
        super().__init__(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )

    def stage(self, state_dict: Any, **kwargs: Any) -> Any:
        """Return a copy of a nested state dict."""
        return with_shard_blocks(super().stage(state_dict, **kwargs))


class BackgroundSaver:
    """Writes the checkpoints of a run in a thread, one at a time.

    All methods are collectives of all ranks.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        # The thread communicates while training does, and must not meet its collectives.
        self._group: Any = dist.new_group(backend="gloo") if processes.many else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[CheckpointWriter, Future[dict[str, dict[str, Any]]]] | None = None
        # In the thread, a context that ignores it would change the filters of all threads.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def save(
        self,
        root: Path,
        step: int,
        tensors: dict[str, Any],
        facts: dict[str, Any],
        *,
        keep: int,
        permanent: Collection[int] = (),
    ) -> None:
        """Begin to write a checkpoint, once the one before it is complete.

        The tensors may be changed as soon as this returns. Arguments are those of
        `save_checkpoint`.

        Raises:
            CheckpointError: if this one cannot be begun, or the one before could not be written.
        """
        self.wait()
        written = CheckpointWriter(root, step, self._processes, keep, permanent)
        with written.explain():
            written.begin(facts)
            saving = dcp.async_save(
                tensors,
                checkpoint_id=str(written.temporary),
                async_stager=Stager(),
                process_group=self._group,
                no_dist=not self._processes.many,
            )
            assert isinstance(saving, Future)

        def write() -> dict[str, dict[str, Any]]:
            saving.result()
            return written.hash_share()

        self._pending = written, self._thread.submit(write)

    def poll(self) -> None:
        """Complete the checkpoint that is being written, if all ranks have written their files.

        Raises:
            CheckpointError: if it could not be written.
        """
        if self._pending is None:
            return
        _, share = self._pending
        if self._processes.max_flag(None if share.done() else 1) is None:
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and complete it.

        Raises:
            CheckpointError: if it could not be written.
        """
        if self._pending is None:
            return
        written, share = self._pending
        self._pending = None
        with written.explain():
            written.complete(share.result())
