"""Operations of one step, on a rank."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.estimate.placement import Placed
from muonscale.lab.estimate.workload import Workload
from muonscale.lab.models.flops import attention_flops_per_token, matrix_flops_per_token
from muonscale.optim.matrices.sharding import Sharding


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of one step."""

    per_token: int
    """Forward and backward, recomputation excluded."""
    passes: int
    """Of the model on one rank; on all of them more than `per_token` says where ranks of a
    tensor-parallel group do the same, as with routed experts."""
    newton_schulz: tuple[int, ...]
    """By rank."""

    @property
    def busiest(self) -> int:
        """Rank with most of Newton-Schulz."""
        return self.newton_schulz.index(max(self.newton_schulz))


def step_flops(
    shape: PreTrainedConfig, model: PreTrainedModel, placed: Placed, workload: Workload
) -> StepFlops:
    """Return the operations of one step.

    Raises:
        ConfigError: for a mixture that does not say how many experts a token goes to.
    """
    matrices = matrix_flops_per_token(shape, model)
    if matrices is None:
        raise ConfigError(
            f"model_type {shape.model_type!r}: it cannot be told how many experts a token meets, so "
            "its operations cannot be counted; accepted are stacked experts and num_experts_per_tok"
        )
    attention = attention_flops_per_token(shape, workload.sequence_length)
    ways = placed.topology.tensor
    own = sum(
        count // (ways if _divided(placed, placed.layouts[name]) else 1)
        for name, count in matrices.items()
    )
    return StepFlops(
        per_token=sum(matrices.values()) + attention,
        passes=workload.rank_tokens * (own + attention // ways),
        newton_schulz=newton_schulz_flops(placed),
    )


def newton_schulz_flops(placed: Placed) -> tuple[int, ...]:
    """Return the operations of Newton-Schulz in one step, by rank: sums over a rank's domains."""
    world = placed.topology.world
    loads = [(domain, domain.plan.loads()) for domain in placed.matrices]
    return tuple(
        sum(load[domain.position(rank, world)] for domain, load in loads) for rank in range(world)
    )


def _divided(placed: Placed, layout: Sharding) -> bool:
    """Return whether tensor-parallel ranks have parts of a matrix; its axis is the mesh's last."""
    topology = placed.topology
    return (
        topology.tensor > 1 and len(layout.ranks) == topology.world and layout.cuts[-1] is not None
    )
