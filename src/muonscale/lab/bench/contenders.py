"""Who is measured: the configured optimizer, and torch's AdamW and Muon on the same parameters.

All sides share parameters and gradients, which none of them changes. A round times each of the
others right beside a step of ours, first one and then the other first, so that a change in the
machine's speed meets both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from muonscale.lab.bench.measure import executed_flops, peak_extra_bytes, seconds_of, state_bytes

WARMUP = 1
"""Steps before those that are timed, after the one whose operations are counted."""

OURS, ADAMW, TORCH_MUON = "muonscale", "torch.optim.AdamW", "torch.optim.Muon"


@dataclass
class Side:
    """An optimizer, and how long its steps took."""

    name: str
    optimizer: Optimizer
    device: torch.device
    seconds: list[float] = field(default_factory=list)
    pairs: list[float] = field(default_factory=list)
    """How many times as long as ours, by round."""
    flops: int = 0
    extra_bytes: int = 0

    def begin(self) -> None:
        """Take the first steps, in which state is made, and measure what need not be repeated."""
        self.flops = executed_flops(self.optimizer.step)
        for _ in range(WARMUP):
            self.optimizer.step()
        self.extra_bytes = peak_extra_bytes(self.optimizer.step, self.device)

    def step(self) -> float:
        """Take a step and return its seconds."""
        return seconds_of(self.optimizer.step, self.device)

    @cached_property
    def state_bytes(self) -> int:
        """Bytes kept between steps."""
        return state_bytes(self.optimizer.state)

    def facts(self) -> dict[str, Any]:
        """Return medians, quartiles and bytes as plain values; seconds."""
        found = {
            "seconds": spread(self.seconds),
            "flops": self.flops,
            "state_bytes": self.state_bytes,
            "extra_bytes": self.extra_bytes,
        }
        return found | ({"times_ours": spread(self.pairs)} if self.pairs else {})


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles, which of a single value are that value."""
    several = list(values) * (1 if len(values) > 1 else 2)
    low, middle, high = statistics.quantiles(several, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def adamw(parameters: Sequence[Parameter]) -> Optimizer:
    """Return torch's AdamW in its fastest form."""
    return torch.optim.AdamW(list(parameters), lr=1e-3, weight_decay=0.1, fused=True)


def torch_muon(parameters: Sequence[Parameter]) -> Optimizer:
    """Return torch's Muon with the RMS scale, as it is shipped: products in bfloat16."""
    return torch.optim.Muon(
        list(parameters), lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )


def play(
    ours: Side, others: Sequence[Side], rounds: int, tell: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """Take the rounds and return the facts of every side by name."""
    for side in (ours, *others):
        side.begin()
    for number in range(rounds):
        tell(number)
        if not others:
            ours.seconds.append(ours.step())
        for other in others:
            pair = (ours, other) if number % 2 == 0 else (other, ours)
            taken = {side.name: side.step() for side in pair}
            for side in pair:
                side.seconds.append(taken[side.name])
            other.pairs.append(taken[other.name] / taken[ours.name])
    return {side.name: side.facts() for side in (ours, *others)}
