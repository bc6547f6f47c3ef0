"""Profiles of some steps of a run: a trace, the slowest operators, and memory.

For the profiled steps every rank writes to `profile/` of the run folder
`steps-10-14.rank0.trace.json.gz` (for chrome://tracing or ui.perfetto.dev), `.operators.txt` and
`.memory.json`; on a GPU also `.memory.pickle` (for pytorch.org/memory_viz).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from muonscale.lab.files import write_atomic
from muonscale.lab.training.profiler_memory import (
    allocations_by_operator,
    bytes_alive,
    memory_changes,
    silence_profiler,
)

ROWS = 40
"""Number of operators in a table."""
POINTS = 2000
"""Maximum number of points of the memory timeline; each is the largest value of an interval."""
HISTORY = 1_000_000
"""Number of allocations in a snapshot of a GPU's memory."""


class Profiler:
    """Profiles the steps of a range, and writes the profile when they are done or the run stops.

    Args:
        steps: the steps to profile, the first of the run being step 1.
        folder: folder of the files.
        rank: rank of this process.
        device: device that it trains on.
        warn: called if a profile cannot be written; the run continues.
    """

    def __init__(
        self,
        steps: range,
        folder: Path,
        rank: int,
        device: torch.device,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._steps, self._folder, self._rank, self._device = steps, folder, rank, device
        self._warn = warn
        self._recorded: profile | None = None
        self._first = self._last = 0

    @contextmanager
    def step(self, number: int) -> Generator[bool]:
        """Profile the step taken in this block, if it is one of the range; yield whether it is."""
        if number not in self._steps:
            yield False
            return
        if self._recorded is None:
            activities, self._first = [ProfilerActivity.CPU], number
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history(max_entries=HISTORY)
            self._recorded = profile(activities=activities, record_shapes=True, profile_memory=True)
            with silence_profiler():
                self._recorded.start()
        with record_function(f"muonscale/step {number}"):
            yield True
        self._last = number
        if number == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write the profile, if there is one that is not written."""
        recorded, self._recorded = self._recorded, None
        if recorded is None:
            return
        with silence_profiler():
            recorded.stop()
        try:
            if self._last >= self._first:  # otherwise the first step was not completed
                self._folder.mkdir(exist_ok=True)
                stem = self._folder / f"steps-{self._first}-{self._last}.rank{self._rank}"
                recorded.export_chrome_trace(f"{stem}.trace.json.gz")
                table = operators(recorded, self._device)
                write_atomic(Path(f"{stem}.operators.txt"), table)
                content = json.dumps(memory(recorded))
                write_atomic(Path(f"{stem}.memory.json"), content + "\n")
                if self._device.type == "cuda":
                    torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")
        except OSError as error:
            where = error.filename or self._folder
            self._warn(f"the profile is not written: {where}: {error.strerror or error}")
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)


def operators(recorded: profile, device: torch.device) -> str:
    """Return the time of our ranges, and tables of the operators by time and by memory."""
    averages, kind = recorded.key_averages(), device.type
    ranges = [
        f"{each.key:32}{each.count:4} times, {each.cpu_time_total / 1000:10.2f} ms"
        for each in averages
        if each.key.startswith("muonscale/")
    ]
    tables = [
        averages.table(sort_by=key, row_limit=ROWS, max_name_column_width=60)
        for key in (f"self_{kind}_time_total", f"self_{kind}_memory_usage")
    ]
    return "\n".join([*ranges, "", *tables])


def memory(recorded: profile) -> dict[str, Any]:
    """Return how the profiled steps used the CPU's memory.

    Returns:
        peak_bytes: peak of the allocated bytes, relative to the beginning; peak_bytes_by_range: the
        same within each of our named ranges; allocated_bytes_by_operator: the operators with the
        largest own allocations, whether released or not; timeline: [milliseconds, bytes] pairs,
        the bytes as for the peak. None of them includes memory allocated before the first step.
    """
    changes = memory_changes(recorded)
    after = bytes_alive(changes)
    # The clock of the allocations, in nanoseconds.
    zero = recorded.profiler.kineto_results.trace_start_ns()  # pyrefly: ignore [missing-attribute]
    ranges: dict[str, int] = {}
    for event in recorded.events() or []:
        if event.name.startswith("muonscale/") and event.device_type.name == "CPU":
            start, end = (zero + 1000 * t for t in (event.time_range.start, event.time_range.end))
            inside = [b for c, b in zip(changes, after, strict=True) if start <= c.ns <= end]
            ranges[event.name] = max(ranges.get(event.name, 0), *inside, 0)
    return {
        "peak_bytes": max(after, default=0),
        "peak_bytes_by_range": ranges,
        "allocated_bytes_by_operator": dict(
            allocations_by_operator(recorded, changes).most_common(ROWS)
        ),
        "timeline": _timeline([change.ns for change in changes], after),
    }


def _timeline(ns: list[int], after: list[int]) -> list[tuple[float, int]]:
    part = max(1, -(-len(ns) // POINTS))
    bounds = [*range(0, len(ns), part), len(ns)]
    tops = [max(range(low, high), key=after.__getitem__) for low, high in pairwise(bounds)]
    return [(round((ns[i] - ns[0]) / 1e6, 3), after[i]) for i in tops]
