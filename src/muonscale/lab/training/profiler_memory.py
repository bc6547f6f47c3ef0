"""Allocations and releases of memory in a recording of torch's profiler, by operator.

Memory that libraries such as a BLAS allocate themselves is not included.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.profiler import profile

MEMORY = "[memory]"
"""Name of the profiler's memory events."""


@dataclass(frozen=True)
class MemoryChange:
    """An allocation (bytes above 0) or a release (bytes below 0)."""

    ns: int
    bytes: int
    thread: int


def memory_changes(recorded: profile) -> list[MemoryChange]:
    """Return the allocations and releases of CPU memory, in order of time."""
    events = _events(recorded)
    changes = [
        MemoryChange(event.start_ns(), event.nbytes(), event.start_thread_id())
        for event in events
        if event.name() == MEMORY and event.device_type().name == "CPU"
    ]
    return sorted(changes, key=lambda change: change.ns)


def _events(recorded: profile) -> list[Any]:
    return recorded.profiler.kineto_results.events()  # pyrefly: ignore [missing-attribute]


def bytes_alive(changes: Sequence[MemoryChange]) -> list[int]:
    """Return the allocated bytes after each change, relative to the beginning."""
    total, after = 0, []
    for change in changes:
        total += change.bytes
        after.append(total)
    return after


def allocations_by_operator(recorded: profile, changes: Sequence[MemoryChange]) -> Counter[str]:
    """Return the bytes that every operator has allocated itself, whether released or not.

    An allocation belongs to the innermost operator running on its thread; `outside` if there is
    none.
    """
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for event in _events(recorded):
        if event.device_type().name == "CPU" and event.name() != MEMORY:
            span = (event.start_ns(), event.end_ns(), event.name())
            spans.setdefault(event.start_thread_id(), []).append(span)
    totals: Counter[str] = Counter()
    for thread, here in spans.items():
        mine = [change for change in changes if change.thread == thread and change.bytes > 0]
        for change, name in _innermost(mine, sorted(here, key=lambda s: (s[0], -s[1]))):
            totals[name] += change.bytes
    for change in changes:
        if change.bytes > 0 and change.thread not in spans:
            totals["outside"] += change.bytes
    return totals


def _innermost(
    changes: Sequence[MemoryChange], spans: Sequence[tuple[int, int, str]]
) -> Iterator[tuple[MemoryChange, str]]:
    """Yield each change of a thread with the name of the innermost span around it."""
    stack: list[tuple[int, str]] = []
    upcoming = iter([*spans, None])
    span = next(upcoming)
    for change in changes:
        while span is not None and span[0] <= change.ns:
            while stack and stack[-1][0] <= span[0]:
                stack.pop()
            stack.append((span[1], span[2]))
            span = next(upcoming)
        while stack and stack[-1][0] < change.ns:
            stack.pop()
        yield change, stack[-1][1] if stack else "outside"


@contextmanager
def silence_profiler() -> Generator[None]:
    """Hide the messages that the profiler's C++ writes to stderr at every start and stop."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
