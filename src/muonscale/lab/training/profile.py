"""Profiles of some steps of a run: a trace, the operators that took longest, and memory.

Every rank leaves in `profile/` of the run folder, for the steps it profiled,
`steps-10-14.rank0.trace.json.gz` (for chrome://tracing or ui.perfetto.dev), `.operators.txt` and
`.memory.json`; on a GPU also `.memory.pickle` (for pytorch.org/memory_viz).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from muonscale.lab.files import write_atomic
from muonscale.lab.training.profiler_memory import alive, allocated_by, memory_changes, quiet

ROWS = 40
"""Operators in a table."""
POINTS = 2000
"""Points of the timeline of memory at most; each is the largest value of its part."""
HISTORY = 1_000_000
"""Allocations that a snapshot of a GPU's memory remembers."""


class Profiler:
    """Profiles the steps of a range, and writes what it found when they are done or the run stops.

    Args:
        steps: to profile, the first of the run being step 1.
        folder: for the files.
        rank: of this process.
        device: that it trains on.
        warn: told where a profile could not be written; the run goes on.
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
            self._start(number)
        with record_function(f"muonscale/step {number}"):
            yield True
        self._last = number
        if number == self._steps[-1]:
            self.close()

    def _start(self, number: int) -> None:
        activities, self._first = [ProfilerActivity.CPU], number
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        self._recorded = profile(activities=activities, record_shapes=True, profile_memory=True)
        with quiet():
            self._recorded.start()

    def close(self) -> None:
        """Write what was profiled, if anything is not yet written."""
        recorded, self._recorded = self._recorded, None
        if recorded is None:
            return
        with quiet():
            recorded.stop()
        try:
            if self._last >= self._first:  # else the first step did not come to its end
                self._write(recorded)
        except OSError as error:
            where = error.filename or self._folder
            self._warn(f"the profile is not written: {where}: {error.strerror or error}")
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, recorded: profile) -> None:
        self._folder.mkdir(exist_ok=True)
        stem = self._folder / f"steps-{self._first}-{self._last}.rank{self._rank}"
        recorded.export_chrome_trace(f"{stem}.trace.json.gz")
        write_atomic(Path(f"{stem}.operators.txt"), operators(recorded, self._device))
        content = json.dumps(memory(recorded))
        write_atomic(Path(f"{stem}.memory.json"), content + "\n")
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")


@contextmanager
def profiling(profiler: Profiler) -> Generator[Profiler]:
    """Write what was profiled also when the run is stopped in between."""
    with ExitStack() as stack:
        stack.callback(profiler.close)
        yield profiler


def operators(recorded: profile, device: torch.device) -> str:
    """Return the time of our ranges, and tables of the operators that took most time and memory."""
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
    """Return what the profiled steps did to the CPU's memory.

    Returns:
        peak_bytes: most bytes alive at once above those at the beginning; peak_bytes_by_range: the
        same while each of our named ranges ran; allocated_bytes_by_operator: the operators that
        allocated most themselves, released again or not; timeline: [milliseconds, bytes] pairs, the
        bytes as for the peak. Memory from before the first step is in none of them, released or not.
    """
    changes = memory_changes(recorded)
    after = alive(changes)
    ranges: dict[str, int] = {}
    for event in recorded.events() or []:
        if event.name.startswith("muonscale/") and event.device_type.name == "CPU":
            start, end = _nanoseconds(recorded, event.time_range)
            inside = [b for c, b in zip(changes, after, strict=True) if start <= c.ns <= end]
            ranges[event.name] = max(ranges.get(event.name, 0), *inside, 0)
    return {
        "peak_bytes": max(after, default=0),
        "peak_bytes_by_range": ranges,
        "allocated_bytes_by_operator": dict(allocated_by(recorded, changes).most_common(ROWS)),
        "timeline": _timeline([change.ns for change in changes], after),
    }


def _nanoseconds(recorded: profile, interval: Any) -> tuple[float, float]:
    """Return when an event began and ended on the clock of the allocations."""
    zero = recorded.profiler.kineto_results.trace_start_ns()  # pyrefly: ignore [missing-attribute]
    return zero + interval.start * 1000, zero + interval.end * 1000


def _timeline(ns: list[int], after: list[int]) -> list[tuple[float, int]]:
    part = max(1, -(-len(ns) // POINTS))
    bounds = [*range(0, len(ns), part), len(ns)]
    tops = [max(range(low, high), key=after.__getitem__) for low, high in pairwise(bounds)]
    return [(round((ns[i] - ns[0]) / 1e6, 3), after[i]) for i in tops]
