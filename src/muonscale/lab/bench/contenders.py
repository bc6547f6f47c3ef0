"""The optimizers that are measured: the configured one, and torch's AdamW and Muon.

All share parameters and gradients, which no step changes. In a round each of the others is timed
right beside a step of ours, in alternating order, so that a change in the machine's speed affects
both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from muonscale.lab.bench.measure import executed_flops, peak_extra_bytes, seconds_of, state_bytes

WARMUP = 1
"""Untimed steps after the one whose operations are counted."""

OURS, ADAMW, TORCH_MUON = "muonscale", "torch.optim.AdamW", "torch.optim.Muon"


@dataclass
class Contender:
    """An optimizer, and how long its steps took."""

    name: str
    optimizer: Optimizer
    device: torch.device
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    """Its seconds over ours, by round."""
    flops: int = 0
    extra_bytes: int = 0

    def begin(self) -> None:
        """Take the first steps, which create the state, and measure what does not vary."""
        self.flops = executed_flops(self.optimizer.step)
        for _ in range(WARMUP):
            self.optimizer.step()
        self.extra_bytes = peak_extra_bytes(self.optimizer.step, self.device)

    def step(self) -> float:
        """Take a step and return its seconds."""
        return seconds_of(self.optimizer.step, self.device)

    def facts(self) -> dict[str, Any]:
        """Return medians, quartiles and bytes as plain values."""
        facts = {
            "seconds": spread(self.seconds),
            "flops": self.flops,
            "state_bytes": state_bytes(self.optimizer.state),
            "extra_bytes": self.extra_bytes,
        }
        return facts | ({"times_ours": spread(self.ratios)} if self.ratios else {})


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles; a single value is all three."""
    several = list(values) * (1 if len(values) > 1 else 2)
    low, middle, high = statistics.quantiles(several, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def make_adamw(parameters: Sequence[Parameter]) -> Optimizer:
    """Return torch's AdamW in its fastest form."""
    return torch.optim.AdamW(list(parameters), lr=1e-3, weight_decay=0.1, fused=True)


def make_torch_muon(parameters: Sequence[Parameter]) -> Optimizer:
    """Return torch's Muon with the RMS scale and, as it is shipped, products in bfloat16."""
    return torch.optim.Muon(
        list(parameters), lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )


def run_rounds(
    ours: Contender, others: Sequence[Contender], rounds: int, tell: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """Time all contenders and return the facts of each by name."""
    for contender in (ours, *others):
        contender.begin()
    for number in range(rounds):
        tell(number)
        if not others:
            ours.seconds.append(ours.step())
        for other in others:
            pair = (ours, other) if number % 2 == 0 else (other, ours)
            taken = {contender.name: contender.step() for contender in pair}
            for contender in pair:
                contender.seconds.append(taken[contender.name])
            other.ratios.append(taken[other.name] / taken[ours.name])
    return {contender.name: contender.facts() for contender in (ours, *others)}
