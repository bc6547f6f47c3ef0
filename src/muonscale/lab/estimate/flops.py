"""FLOPs of one step on a rank."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from muonscale.lab.estimate.placement import Placement
from muonscale.lab.estimate.workload import Workload
from muonscale.lab.models.flops import (
    attention_flops_per_token,
    matrix_flops_per_token,
    unknown_experts,
)


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of one step."""

    per_token: int
    """Forward and backward, without recomputation."""
    passes: int
    """FLOPs of the model on one rank. The sum over ranks exceeds that of `per_token` if the ranks
    of a tensor-parallel group compute the same, as with routed experts."""
    newton_schulz: tuple[int, ...]
    """FLOPs of Newton-Schulz by rank."""

    @property
    def busiest(self) -> int:
        """Rank with the most FLOPs of Newton-Schulz."""
        return self.newton_schulz.index(max(self.newton_schulz))


def step_flops(
    shape: PreTrainedConfig, model: PreTrainedModel, placement: Placement, workload: Workload
) -> StepFlops:
    """Return the FLOPs of one step.

    Raises:
        ConfigError: for a mixture of experts whose configuration does not say how many experts a
            token uses.
    """
    matrices = matrix_flops_per_token(shape, model)
    if matrices is None:
        raise unknown_experts(shape)
    attention = attention_flops_per_token(shape, workload.sequence_length)
    ways = placement.topology.tensor
    own = 0
    for name, count in matrices.items():
        sharding = placement.shardings[name]
        # The tensor-parallel axis is the last one of the mesh.
        on_axis = ways > 1 and len(sharding.ranks) == placement.topology.world
        own += count // (ways if on_axis and sharding.cuts[-1] is not None else 1)
    return StepFlops(
        per_token=sum(matrices.values()) + attention,
        passes=workload.rank_tokens * (own + attention // ways),
        newton_schulz=newton_schulz_flops(placement),
    )


def newton_schulz_flops(placement: Placement) -> tuple[int, ...]:
    """Return the FLOPs of Newton-Schulz in one step by rank, summed over rank groups."""
    world = placement.topology.world
    return tuple(
        sum(group.loads[group.group_rank(rank, world)] for group in placement.matrices)
        for rank in range(world)
    )
