"""The work of one step on one rank: tokens, micro-batches, dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from muonscale.lab.config.load import Config
from muonscale.lab.devices import Device
from muonscale.lab.parallel.topology import Topology
from muonscale.lab.training.micro_batches import check_shares, micro_batch_size


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of one step on one rank."""

    sequence_length: int
    batch_tokens: int
    """Tokens of one step over all ranks, for the largest batch of the run."""
    rank_tokens: int
    """Tokens of one step on a rank; the ranks of a tensor-parallel group read the same tokens."""
    micro_tokens: int
    """Tokens of a micro-batch."""
    precision: torch.dtype
    """Dtype of forward and backward passes and of reduced gradients."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    averages: bool
    """Whether the average of the weights is kept beside them."""
    steps: int
    """Steps of the run."""
    tokens: int
    """Tokens of the run."""

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in a step."""
        return self.rank_tokens // self.micro_tokens


def make_workload(config: Config, topology: Topology, device: Device) -> Workload:
    """Return the workload of a configuration under a topology.

    Raises:
        ConfigError: as `check_shares`.
    """
    length, timeline = config.data.sequence_length, config.timeline
    check_shares(config, topology)
    batch = timeline.largest_batch
    share = batch // topology.data_ranks
    precision = config.train.precision
    if precision == "auto":
        precision = "float32" if device.kind == "cpu" else "bfloat16"
    return Workload(
        sequence_length=length,
        batch_tokens=batch * length,
        rank_tokens=share * length,
        micro_tokens=micro_batch_size(config, share) * length,
        precision=torch.bfloat16 if precision == "bfloat16" else torch.float32,
        checkpointing=config.train.activation_checkpointing,
        averages=config.train.average is not None,
        steps=config.steps,
        tokens=timeline.tokens_before(config.steps),
    )
