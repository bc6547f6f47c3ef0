"""What one step works through on one rank: tokens, micro-batches, dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from muonscale.lab.config.load import Config
from muonscale.lab.estimate.devices import Device
from muonscale.lab.parallel.topology import Topology, check_shares


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step, as one rank sees it."""

    sequence_length: int
    batch_tokens: int
    """Of one step, over all ranks; of the largest where the batch changes."""
    rank_tokens: int
    """Of one step, on a rank; ranks of a tensor-parallel group have the same ones."""
    micro_tokens: int
    """That go through the model at a time."""
    precision: torch.dtype
    """Of forward and backward passes and of reduced gradients."""
    checkpointing: bool
    """Whether activations are computed again in the backward pass."""
    steps: int
    tokens: int
    """Of the run."""

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes in a step."""
        return self.rank_tokens // self.micro_tokens


def make_workload(config: Config, topology: Topology, device: Device) -> Workload:
    """Return the workload of a configuration on an arrangement.

    Raises:
        ConfigError: where the batch does not divide into whole sequences for every rank, or a rank's
            share into micro-batches.
    """
    length, timeline = config.data.sequence_length, config.timeline
    batch = timeline.largest_batch * length
    check_shares(config, topology)
    share = batch // topology.data_ranks
    micro = config.train.micro_batch_tokens or share
    return Workload(
        sequence_length=length,
        batch_tokens=batch,
        rank_tokens=share,
        micro_tokens=micro,
        precision=_precision(config.train.precision, device),
        checkpointing=config.train.activation_checkpointing,
        steps=config.steps,
        tokens=timeline.tokens_before(config.steps),
    )


def _precision(name: str, device: Device) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.kind == "cpu" else "bfloat16"
    return torch.bfloat16 if name == "bfloat16" else torch.float32
