"""The processes that torchrun started, seen from one of them."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.errors import MuonscaleError
from muonscale.lab.config.sections import ParallelSection
from muonscale.lab.parallel.topology import Topology, arrange

T = TypeVar("T")


@dataclass
class Processes:
    """A process among its equals; alone by default."""

    topology: Topology = field(default_factory=Topology)
    rank: int = 0
    local_rank: int = 0
    """Among the processes of this machine."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _store: dist.Store | None = None
    _asked: int = 0

    @property
    def many(self) -> bool:
        """Whether there are others."""
        return self.topology.world > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of every batch this process reads."""
        return self.topology.data_rank(self.rank)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Return sums over the ranks that read different data, in float64.

        A collective of all ranks.
        """
        if not self.many:
            return [float(value) for value in values]
        here = [torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values]
        return self.sum_tensor(torch.stack(here)).tolist()

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Return a tensor summed over the ranks that read different data: a collective of all ranks.

        Args:
            values: float64 on this process's device.
        """
        if not self.many:
            return values
        sums = values.clone()
        dist.all_reduce(sums)
        return sums / self.topology.tensor

    def max_tensor(self, values: Tensor) -> Tensor:
        """Return the largest of all ranks, element by element: a collective.

        Args:
            values: on this process's device.
        """
        if not self.many:
            return values
        largest = values.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest

    def any(self, flag: int | None) -> int | None:
        """Return the largest of the ranks' flags, None where no rank has one: a collective."""
        if not self.many:
            return flag
        largest = torch.tensor(-1 if flag is None else flag, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return None if largest < 0 else int(largest)

    def gather(self, value: T) -> list[T]:
        """Return what every rank gives, in their order: a collective. Values are pickled."""
        if not self.many:
            return [value]
        values: list[Any] = [None] * self.topology.world
        dist.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something on the first rank alone, and return its result, or raise its error, on all.

        It may take long: the others wait outside of any collective. The result is pickled.
        """
        return self._ahead(work, "all", self.rank == 0, again=False)

    def first_on_machine(self, work: Callable[[], T]) -> T:
        """Do something on the first rank of every machine, and then on its others."""
        return self._ahead(work, f"{self.rank - self.local_rank}", self.local_rank == 0, again=True)

    def _ahead(self, work: Callable[[], T], place: str, ahead: bool, *, again: bool) -> T:
        if self._store is None:
            return work()
        self._asked += 1
        key = f"muonscale/{self._asked}/{place}"
        if ahead:
            try:
                result = work()
            except Exception as error:
                self._store.set(key, pickle.dumps((False, error)))  # pyrefly: ignore [bad-argument-type]
                raise
            self._store.set(key, pickle.dumps((True, None if again else result)))  # pyrefly: ignore [bad-argument-type]
            return result
        _wait_for(self._store, key)
        good, answer = pickle.loads(self._store.get(key))
        if not good:
            raise answer
        return work() if again else answer


def _wait_for(store: dist.Store, key: str) -> None:
    """Wait for a key, however long, asking more and more seldom; signals are heard meanwhile."""
    pause = 0.005
    while not store.check([key]):
        time.sleep(pause)
        pause = min(1.2 * pause, 0.5)


def started_by_torchrun() -> bool:
    """Return whether this process is one of several of a job."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def restarted() -> bool:
    """Return whether torchrun has started this job before (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


@contextmanager
def joined(section: ParallelSection, device: torch.device) -> Generator[Processes]:
    """Join the other processes of the job for as long as the block lasts.

    Args:
        section: how to arrange them.
        device: `cpu` (gloo) or `cuda` (nccl); of several GPUs each process takes its own.

    Raises:
        ConfigError: where the processes cannot be arranged so.
        MuonscaleError: where another process is gone.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    topology = arrange(section, world, machines=max(1, world // local_world))
    if world == 1:
        yield Processes(topology, device=device)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    backend = "gloo"
    if device.type == "cuda":
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    # It advises other meshes when what FSDP over tensor parallelism has cut is put together.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    store = _own_store()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield Processes(topology, rank, local_rank, device, store)
    except RuntimeError as error:
        if _is_lost_peer(error):
            # torchrun now ends this process too: not before it has said why it ends by itself
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise MuonscaleError(
                f"another process of the job is gone, and this one cannot go on ({_first_line(error)})"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def _own_store() -> dist.Store:
    """Return the store of this start of the job.

    torchrun may keep the store over a restart; in it are the addresses of processes that are gone.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""What gloo says when it is another process that has failed."""


def _is_lost_peer(error: RuntimeError) -> bool:
    return any(text in str(error) for text in LOST) or isinstance(error, dist.DistNetworkError)


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0]
