"""Seconds of a step, computed from FLOPs, bytes and stated rates.

Two overlaps are assumed: the messages of FSDP and DDP with the forward and backward passes, and
Muon's exchange with Newton-Schulz of another round. Activations of tensor and expert parallelism
and messages within subgroups do not overlap. A message between ranks of one machine has the
bandwidth within a machine, any other that between machines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from muonscale.lab.devices import Device
from muonscale.lab.estimate.traffic import Message

NS_MFU = 0.5
"""MFU of Newton-Schulz: large square products, but in batches; assumption, untested."""

RECOMPUTED = 4 / 3
"""Ratio of FLOPs with and without activation checkpointing, which repeats the forward pass."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step."""

    passes: float
    """Forward and backward."""
    exposed: float
    """Messages of parameters and gradients that the passes do not hide."""
    hidden: float
    """Messages of parameters and gradients that the passes hide."""
    activations: float
    """Messages of tensor and expert parallelism."""
    newton_schulz: float
    exchange: float
    """Messages of the optimizer that are not hidden."""
    elementwise: float
    """Elementwise updates, by memory bandwidth."""

    @property
    def optimizer(self) -> float:
        """Seconds of the optimizer step."""
        return self.newton_schulz + self.exchange + self.elementwise

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.passes + self.exposed + self.activations + self.optimizer


@dataclass(frozen=True, kw_only=True)
class RankWork:
    """The work of the busiest rank in a step."""

    flops: float
    """FLOPs of the model, without recomputation."""
    precision: str
    checkpointing: bool
    ns_flops: int
    """FLOPs of Newton-Schulz on the rank with the most."""
    products: str
    """Dtype of Newton-Schulz."""
    rounds: int
    """Rounds of the exchange."""
    touched: int
    """Float32 values that elementwise updates read or write."""


def step_time(work: RankWork, messages: Iterable[Message], device: Device, mfu: float) -> StepTime:
    """Return the seconds of a step.

    Args:
        work: work of the busiest rank.
        messages: its messages.
        device: rates of the device.
        mfu: share of the peak that the model's passes reach.
    """
    messages = list(messages)
    rate = mfu * device.flops[work.precision]
    passes = work.flops * (RECOMPUTED if work.checkpointing else 1) / rate
    wide = _seconds(messages, device, ("parameters", "gradients"))
    hidden = min(wide, passes)
    ns = work.ns_flops / (NS_MFU * device.flops[work.products])
    return StepTime(
        passes=passes,
        exposed=wide - hidden,
        hidden=hidden,
        activations=_seconds(messages, device, ("tensor", "experts")),
        newton_schulz=ns,
        exchange=_exchange(messages, device, ns, work.rounds),
        elementwise=4 * work.touched / device.memory_bandwidth,
    )


def _exchange(messages: list[Message], device: Device, ns: float, rounds: int) -> float:
    """Return the time of the optimizer's messages that is not hidden.

    Newton-Schulz and the exchange alternate in rounds. Together they take the longer of the two,
    and one round of the other.
    """
    of_matrices = [m for m in messages if m.purpose == "matrices"]
    on_wire = _seconds([m for m in of_matrices if m.kind != "subgroup"], device, ("matrices",))
    both = max(ns, on_wire) + min(ns, on_wire) / rounds
    subgroup = _seconds([m for m in of_matrices if m.kind == "subgroup"], device, ("matrices",))
    return both - ns + subgroup + _seconds(messages, device, ("partitioned",))


def _seconds(messages: list[Message], device: Device, purposes: tuple[str, ...]) -> float:
    """Return the time of the messages for some purposes: sequential, sending while receiving."""
    return sum(
        max(m.sent, m.received)
        / (device.intra if m.within(device.ranks_per_machine) else device.inter)
        for m in messages
        if m.purpose in purposes
    )


def slower_than(muon: float, adamw: float) -> float:
    """Return the relative extra time of a step with Muon over one with AdamW."""
    return muon / adamw - 1


def break_even(muon: float, adamw: float) -> float:
    """Return the saving of steps at which Muon takes the same time: 1 - t_AdamW / t_Muon."""
    return 1 - adamw / muon
