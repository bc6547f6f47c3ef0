"""Seconds of a step, from operations and bytes, at stated rates.

Assumed hidden: FSDP's and DDP's messages behind the forward and backward passes, as far as these
last; Muon's exchange behind Newton-Schulz of another round. Assumed not hidden: activations of
tensor and expert parallelism, and what teams send. A message whose ranks are in one machine goes at
that bandwidth, any other at the one between machines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from muonscale.lab.estimate.devices import Device
from muonscale.lab.estimate.traffic import Message

NS_MFU = 0.5
"""Of the peak, for Newton-Schulz: large square products, but in batches; assumption, untested."""

RECOMPUTED = 4 / 3
"""Passes with activation checkpointing over those without: the forward pass is done twice."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step."""

    passes: float
    """Forward and backward."""
    exposed: float
    """Of parameters and gradients on their way, what the passes do not hide."""
    hidden: float
    """What they hide."""
    activations: float
    """Of tensor and expert parallelism."""
    newton_schulz: float
    exchange: float
    """Of the optimizer, what is not hidden."""
    elementwise: float
    """Moments and parameters, by memory bandwidth."""

    @property
    def optimizer(self) -> float:
        """Of the optimizer step."""
        return self.newton_schulz + self.exchange + self.elementwise

    @property
    def total(self) -> float:
        """Of the step."""
        return self.passes + self.exposed + self.activations + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a rank does in a step."""

    flops: float
    """Of the model, recomputation excluded."""
    precision: str
    checkpointing: bool
    ns_flops: int
    """Of the rank with most."""
    products: str
    """Dtype of Newton-Schulz."""
    rounds: int
    """Of the exchange."""
    touched: int
    """Float32 values that the elementwise part of the optimizer reads or writes."""


def step_time(work: Work, found: Iterable[Message], device: Device, mfu: float) -> StepTime:
    """Return the seconds of a step.

    Args:
        work: of the busiest rank.
        found: its messages.
        device: rates.
        mfu: part of the peak that the model's passes reach.
    """
    found = list(found)
    rate = mfu * device.flops[work.precision]
    passes = work.flops * (RECOMPUTED if work.checkpointing else 1) / rate
    wide = _seconds(found, device, ("parameters", "gradients"))
    hidden = min(wide, passes)
    ns = work.ns_flops / (NS_MFU * device.flops[work.products])
    return StepTime(
        passes=passes,
        exposed=wide - hidden,
        hidden=hidden,
        activations=_seconds(found, device, ("tensor", "experts")),
        newton_schulz=ns,
        exchange=_exchange(found, device, ns, work.rounds),
        elementwise=4 * work.touched / device.memory_bandwidth,
    )


def _exchange(found: list[Message], device: Device, ns: float, rounds: int) -> float:
    """Return what of the optimizer's messages is not hidden.

    Of two things done alternately in so many rounds, the longer is on the clock, and one round of
    the other.
    """
    of_matrices = [m for m in found if m.purpose == "matrices"]
    on_wire = _seconds([m for m in of_matrices if m.kind != "team"], device, ("matrices",))
    both = max(ns, on_wire) + min(ns, on_wire) / rounds
    team = _seconds([m for m in of_matrices if m.kind == "team"], device, ("matrices",))
    return both - ns + team + _seconds(found, device, ("partitioned",))


def _seconds(found: list[Message], device: Device, purposes: tuple[str, ...]) -> float:
    """Return how long the messages for some purposes take, one after another, both ways at once."""
    return sum(
        max(m.sent, m.received)
        / (device.intra if m.within(device.ranks_per_machine) else device.inter)
        for m in found
        if m.purpose in purposes
    )


def slower_than(muon: float, adamw: float) -> float:
    """Return by which part a step with Muon is longer than one with AdamW."""
    return muon / adamw - 1


def break_even(muon: float, adamw: float) -> float:
    """Return by which part fewer steps Muon must need to take no longer: 1 - t_AdamW / t_Muon."""
    return 1 - adamw / muon
