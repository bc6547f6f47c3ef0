"""Spikes: steps whose gradient or update is far larger than those before it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW = 100
"""Number of previous steps that a step is compared with; fewer at the start."""

LEAST = 20
"""Number of previous steps below which a step is never a spike."""

FACTOR = 3.0


def is_spike(value: float, before: Sequence[float]) -> bool:
    """Return whether a norm is more than `FACTOR` times the median of the previous norms.

    A few spikes in the window hardly change the median. A norm that is not finite is a spike.

    Args:
        value: norm of the step.
        before: finite norms of the last `WINDOW` steps before it. With fewer than `LEAST` of them a
            finite norm is not a spike.
    """
    if not math.isfinite(value):
        return True
    return len(before) >= LEAST and value > FACTOR * statistics.median(before)


@dataclass
class Spikes:
    """Counts the spikes of a run. Checkpoints contain it, so that a resumed run counts the same."""

    counts: dict[str, int] = field(default_factory=dict)
    """Number of spikes by the name of the norm."""
    last: dict[str, list[float]] = field(default_factory=dict)
    """Last `WINDOW` finite values by the name of the norm."""

    def add(self, values: dict[str, float]) -> dict[str, int]:
        """Add the norms of a step and return the counts of the run so far."""
        for name, value in values.items():
            before = self.last.setdefault(name, [])
            self.counts[name] = self.counts.get(name, 0) + is_spike(value, before)
            if math.isfinite(value):
                self.last[name] = [*before, value][-WINDOW:]
        return dict(self.counts)
