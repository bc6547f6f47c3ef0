"""Spikes: steps whose gradient or update is far larger than those before it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WINDOW = 100
"""Steps before a step that it is compared with, fewer at the start."""

LEAST = 20
"""Steps that there have to be before a step can be a spike."""

FACTOR = 3.0


def is_spike(value: float, before: Sequence[float]) -> bool:
    """Return whether a length is more than `FACTOR` times the median of the lengths before it.

    The median of a window with a few spikes in it is what it would be without them. A length that
    is not finite is a spike.

    Args:
        value: of a step.
        before: of the last `WINDOW` steps before it, finite. Nothing is a spike after fewer than
            `LEAST`.
    """
    if not math.isfinite(value):
        return True
    return len(before) >= LEAST and value > FACTOR * statistics.median(before)


@dataclass
class Spikes:
    """Counts the spikes of a run. Part of its checkpoints, so that a resumed run counts alike."""

    counts: dict[str, int] = field(default_factory=dict)
    """By the name of a length."""
    last: dict[str, list[float]] = field(default_factory=dict)
    """Its last `WINDOW` finite values."""

    def add(self, values: dict[str, float]) -> dict[str, int]:
        """Take in the lengths of a step, and return the counts of the run so far."""
        for name, value in values.items():
            before = self.last.setdefault(name, [])
            self.counts[name] = self.counts.get(name, 0) + is_spike(value, before)
            if math.isfinite(value):
                self.last[name] = [*before, value][-WINDOW:]
        return dict(self.counts)

    def facts(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"counts": self.counts, "last": self.last}

    def restore(self, facts: dict[str, Any] | None) -> None:
        """Take over what `facts` gave; nothing where a checkpoint has none."""
        self.counts = dict(facts["counts"]) if facts else {}
        self.last = {k: list(v) for k, v in facts["last"].items()} if facts else {}
