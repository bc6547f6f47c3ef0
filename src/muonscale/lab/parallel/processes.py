"""The processes that torchrun started, and communication between them."""

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
from torch.distributed.checkpoint.api import CheckpointException

from muonscale.errors import ConfigError, MuonscaleError, first_line
from muonscale.lab.config.sections import ParallelSection
from muonscale.lab.parallel.topology import Topology, arrange

T = TypeVar("T")


@dataclass
class Processes:
    """This rank's view of all processes; a single process by default."""

    topology: Topology = field(default_factory=Topology)
    rank: int = 0
    local_rank: int = 0
    """Rank among the processes of this machine."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _store: dist.Store | None = None
    _calls: int = 0

    @property
    def many(self) -> bool:
        """Whether there are several processes."""
        return self.topology.world > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Index of the share of every batch that this process reads."""
        return self.topology.data_rank(self.rank)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Return sums over the data-parallel ranks, in float64: a collective of all ranks."""
        if not self.many:
            return [float(value) for value in values]
        here = [torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values]
        return self.sum_tensor(torch.stack(here)).tolist()

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Return the sum of a float64 tensor over data-parallel ranks: a collective of all."""
        if not self.many:
            return values
        sums = values.clone()
        dist.all_reduce(sums)
        return sums / self.topology.tensor

    def max_tensor(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum of a tensor over all ranks: a collective."""
        if not self.many:
            return values
        largest = values.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest

    def max_flag(self, flag: int | None) -> int | None:
        """Return the largest flag of any rank, or None if no rank has one: a collective."""
        if not self.many:
            return flag
        largest = torch.tensor(-1 if flag is None else flag, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return None if largest < 0 else int(largest)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks in order: a collective. Values are pickled."""
        if not self.many:
            return [value]
        values: list[Any] = [None] * self.topology.world
        dist.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """Call `work` on the first rank, and return its result, or raise its error, on all ranks.

        It may take any time: the others do not wait in a collective. The result is pickled.
        """
        return self._run_first(work, "all", self.rank == 0, again=False)

    def first_on_machine(self, work: Callable[[], T]) -> T:
        """Call `work` on the first rank of every machine, and then on the other ranks."""
        return self._run_first(
            work, f"{self.rank - self.local_rank}", self.local_rank == 0, again=True
        )

    def _run_first(self, work: Callable[[], T], place: str, first: bool, *, again: bool) -> T:
        if self._store is None:
            return work()
        self._calls += 1
        key = f"muonscale/{self._calls}/{place}"
        if first:
            try:
                result = work()
            except Exception as error:
                self._store.set(key, pickle.dumps((False, _portable(error))))  # pyrefly: ignore [bad-argument-type]
                raise
            self._store.set(key, pickle.dumps((True, None if again else result)))  # pyrefly: ignore [bad-argument-type]
            return result
        pause = 0.005
        # Poll, so that signals are handled in the meantime.
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(1.2 * pause, 0.5)
        good, answer = pickle.loads(self._store.get(key))
        if not good:
            raise answer
        return work() if again else answer


def _portable(error: Exception) -> Exception:
    """Return an error that other processes can read: itself, or one of ours that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # errors of other libraries may not survive being pickled
        return MuonscaleError(f"{type(error).__name__}: {error}")
    return error


def started_by_torchrun() -> bool:
    """Return whether this process is one of several of a job."""
    return _from_environment("WORLD_SIZE", 1) > 1


def _from_environment(name: str, default: int | None = None) -> int:
    """Return a number that torchrun sets in the environment.

    Raises:
        ConfigError: if it is missing and there is no default, or is no whole number.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdecimal():
        given = "missing from the environment" if text is None else f"{text!r} in the environment"
        raise ConfigError(
            f"{name} is {given}, and WORLD_SIZE is {os.environ.get('WORLD_SIZE')!r}: torchrun sets "
            "both. Start several processes with torchrun, or one with WORLD_SIZE unset"
        )
    return int(text)


def check_alone(command: str) -> None:
    """Refuse to run a command, such as "coordcheck runs in one process", in a job of several.

    Raises:
        ConfigError: if this process is one of several of a job.
    """
    if started_by_torchrun():
        raise ConfigError(
            f"{command}, but this is one of {os.environ['WORLD_SIZE']} processes of a job; start it "
            "without torchrun"
        )


def was_restarted() -> bool:
    """Return whether torchrun has started this job before (`--max-restarts`)."""
    return _from_environment("TORCHELASTIC_RESTART_COUNT", 0) > 0


@contextmanager
def init_processes(section: ParallelSection, device: torch.device) -> Generator[Processes]:
    """Initialize the process group of the job inside the block.

    Args:
        section: arrangement of the processes.
        device: `cpu` (gloo) or `cuda` (nccl); each process uses the GPU of its local rank.

    Raises:
        ConfigError: if the processes cannot be arranged in this way.
        MuonscaleError: if another process is lost.
    """
    world = _from_environment("WORLD_SIZE", 1)
    local_world = _from_environment("LOCAL_WORLD_SIZE", world)
    topology = arrange(section, world, machines=max(1, world // local_world))
    if world == 1:
        yield Processes(topology, device=device)
        return
    if device.type == "mps":
        raise ConfigError(f"run.device=mps is for one process, not {world}; use run.device=cpu")
    rank, local_rank = _from_environment("RANK"), _from_environment("LOCAL_RANK", 0)
    _from_environment("MASTER_PORT")
    if rank >= world:
        raise ConfigError(f"RANK is {rank}, and WORLD_SIZE is {world}: ranks are counted from 0")
    backend = "gloo"
    if device.type == "cuda":
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    # It warns about the mesh when parameters of FSDP over tensor parallelism are gathered.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    # torchrun may keep its store over a restart, with addresses of processes that are gone.
    store, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield Processes(topology, rank, local_rank, device, store)
    except RuntimeError as error:
        if is_lost_peer(error):
            # torchrun now terminates this process too; print the error before that
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise MuonscaleError(
                "another process of the job is gone, and this one cannot continue "
                f"({first_line(error)})"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error of torch.distributed says that another process is gone."""
    if isinstance(error, CheckpointException):
        causes = [c[0] if isinstance(c, tuple) else c for c in error.failures.values()]
        return any(map(is_lost_peer, causes))
    return isinstance(error, dist.DistNetworkError) or any(text in str(error) for text in LOST)


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""Messages of gloo when another process has failed."""
