"""What torch's profiler has recorded of memory: every allocation and release, operator by operator.

Scratch space that libraries such as a BLAS take for themselves is not torch's and is not in it.
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
"""Name of the profiler's events of memory."""


@dataclass(frozen=True)
class Change:
    """One allocation (bytes above 0) or release (below)."""

    ns: int
    bytes: int
    thread: int


def memory_changes(recorded: profile) -> list[Change]:
    """Return what was allocated and released in the CPU's memory, in order of time."""
    events = _events(recorded)
    changes = [
        Change(event.start_ns(), event.nbytes(), event.start_thread_id())
        for event in events
        if event.name() == MEMORY and event.device_type().name == "CPU"
    ]
    return sorted(changes, key=lambda change: change.ns)


def _events(recorded: profile) -> list[Any]:
    return recorded.profiler.kineto_results.events()  # pyrefly: ignore [missing-attribute]


def alive(changes: Sequence[Change]) -> list[int]:
    """Return the bytes alive after each change, of those at the beginning that were 0."""
    total, after = 0, []
    for change in changes:
        total += change.bytes
        after.append(total)
    return after


def allocated_by(recorded: profile, changes: Sequence[Change]) -> Counter[str]:
    """Return the bytes that every operator has allocated itself, released again or not.

    An operator is the innermost one that runs on the thread of the allocation; `outside` is none.
    """
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for event in _events(recorded):
        if event.device_type().name == "CPU" and event.name() != MEMORY:
            span = (event.start_ns(), event.end_ns(), event.name())
            spans.setdefault(event.start_thread_id(), []).append(span)
    found: Counter[str] = Counter()
    for thread, here in spans.items():
        mine = [change for change in changes if change.thread == thread and change.bytes > 0]
        for change, name in _innermost(mine, sorted(here, key=lambda s: (s[0], -s[1]))):
            found[name] += change.bytes
    for change in changes:
        if change.bytes > 0 and change.thread not in spans:
            found["outside"] += change.bytes
    return found


def _innermost(
    changes: Sequence[Change], spans: Sequence[tuple[int, int, str]]
) -> Iterator[tuple[Change, str]]:
    """Yield each change of a thread with the name of the innermost span that holds it."""
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
def quiet() -> Generator[None]:
    """Keep away what the profiler's C++ writes to stderr at every start and stop."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
