"""Independent work of a CPU side by side, one thread each, in place of all threads on each product.

A matrix that one core works on stays in its cache. With the rows of every product dealt out to all
cores, each reads what the others have just written. Measured: EXPERIMENTS.md, "A core per matrix".
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def run_side_by_side(work: Callable[[list[T]], None], parts: list[T]) -> None:
    """Call `work` on all of `parts`, in lists that are worked on at the same time where that can be.

    As many parts as divide by the number of torch's threads are dealt out to workers of one thread
    each; what is left over gets all threads. On one thread, under `torch.compile` or a dispatch mode
    (which sees the work of its own thread alone) it is `work(parts)`.

    Args:
        work: of tensors on a CPU; to be called from several threads, without autograd.
        parts: independent of each other. Which share a list does not depend on timing.
    """
    threads = torch.get_num_threads()
    whole = len(parts) - len(parts) % threads
    if threads == 1 or not whole or _is_observed():
        work(parts)
        return
    pool = _pool(threads)
    running = [pool.submit(work, parts[n:whole:threads]) for n in range(threads)]
    for one in running:
        one.result()
    if whole < len(parts):
        work(parts[whole:])


def _is_observed() -> bool:
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return `threads` workers of one thread each."""
    workers = ThreadPoolExecutor(threads, "muonscale", _begin)
    together = threading.Barrier(threads)
    for begun in [workers.submit(together.wait) for _ in range(threads)]:
        begun.result()
    # What a worker sets for itself is also what threads that begin later would start with.
    torch.set_num_threads(threads)
    return workers


def _begin() -> None:
    torch.get_num_threads()  # whose first call in a thread sets what all threads begin with
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
