"""Measures what a function takes on any device: memory, operations, seconds; and bytes of state."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from muonscale.lab.training.profiler_memory import bytes_alive, memory_changes, silence_profiler

CPU = torch.device("cpu")


def peak_extra_bytes(run: Callable[[], object], device: torch.device = CPU) -> int:
    """Return the peak of tensor memory while `run` runs, in bytes above that at its start.

    On a CPU it comes from the profiler's record of torch's own allocations: temporaries inside an
    operation count, the scratch space of the BLAS library does not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        silence_profiler(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        run()
    return max(bytes_alive(memory_changes(recorded)), default=0)


def executed_flops(run: Callable[[], object]) -> int:
    """Return the floating-point operations of the matrix products in `run`."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def state_bytes(state: Any) -> int:
    """Return the bytes of all tensors in an optimizer's state, however nested."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif hasattr(value, "values"):
            for inner in value.values():
                visit(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                visit(inner)

    visit(state)
    return sum(storages.values())


def seconds_of(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Return the seconds until the device has finished all work of `run`."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
