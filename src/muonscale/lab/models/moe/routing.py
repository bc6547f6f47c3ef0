"""The arithmetic of routing in a mixture of experts: loads, balance, router bias, auxiliary loss.

All functions are pure. The *load* of an expert is the number of times it was chosen. The *affinity*
of a token to an expert is its score, normalized to sum to 1 over the experts.

Letters: M layers with routed experts, B sequences, T tokens of each, N = B T tokens, E experts, K
experts chosen by a token.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

ScoreT = Literal["sigmoid", "softmax"]
"""Function that maps router logits to affinities."""

BiasUpdateT = Literal["centered", "sign"]
"""Step of the router bias: Moonlight's, whose mean is zero, or DeepSeek-V3's."""


def expert_loads(chosen_NK: Tensor, experts: int) -> Tensor:
    """Count how often every expert was chosen.

    Args:
        chosen_NK: expert numbers, int64 `[N, K]`, in [0, experts).
        experts: number of experts.

    Returns:
        The loads, float64 `[E]`; they sum to N K.
    """
    chosen = chosen_NK.flatten()
    loads_E = torch.zeros(experts, dtype=torch.float64, device=chosen.device)
    return loads_E.index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float64))


def bias_step(loads_E: Tensor, rate: float, update: BiasUpdateT) -> Tensor:
    """Return the step of the bias that a router adds to affinities before it chooses.

        e_i = mean(load) - load_i
        sign:      u sign(e_i)
        centered:  u (sign(e_i) - mean_j sign(e_j))

    Centered steps sum to zero, so that the biases cannot all grow together. The choice of experts
    is the same, since a constant added to all biases does not change their order.

    Args:
        loads_E: loads of one step and layer, `[E]`.
        rate: u, in units of an affinity.
        update: form of the step.

    References:
        Wang et al., Auxiliary-loss-free load balancing, arXiv 2408.15664, algorithm 1 (sign);
        Liu et al., Muon is scalable for LLM training, arXiv 2502.16982, appendix C (centered).
    """
    sign_E = (loads_E.mean() - loads_E).sign()
    if update == "centered":
        sign_E = sign_E - sign_E.mean()
    return rate * sign_E


def affinities(logits_NE: Tensor, score: ScoreT) -> Tensor:
    """Return the affinities of tokens to experts, float32 `[N, E]`; every row sums to 1.

    References: DeepSeek-AI, DeepSeek-V3, arXiv 2412.19437, eq. 19 (sigmoids over their sum).
    """
    logits_NE = logits_NE.float()
    if score == "softmax":
        return logits_NE.softmax(-1)
    sigmoid_NE = logits_NE.sigmoid()
    return sigmoid_NE / (sigmoid_NE.sum(-1, keepdim=True) + 1e-20)


def router_entropy(affinities_NE: Tensor) -> Tensor:
    """Return the entropy of every token's affinities over log E, `[N]`: 1 uniform, 0 one expert."""
    return torch.special.entr(affinities_NE).sum(-1) / math.log(affinities_NE.shape[-1])


def sequence_balance(affinities_BTE: Tensor, chosen: int) -> Tensor:
    """Return the sequence-level auxiliary loss without its coefficient, averaged over sequences.

        sum_i f_i P_i,  f_i = E / (K T) * number of tokens t with i among their K largest
        affinities,
                        P_i = mean_t affinity_ti

    It is 1 if all experts are equally likely. Only P is differentiated. As in the paper, f counts
    the K largest affinities without the router's bias.

    Args:
        affinities_BTE: float `[B, T, E]`; rows sum to 1.
        chosen: K.

    References: DeepSeek-AI, DeepSeek-V3, arXiv 2412.19437, eq. 17-20.
    """
    B, T, E = affinities_BTE.shape
    top_BTK = affinities_BTE.detach().topk(chosen, dim=-1).indices
    counts_BE = affinities_BTE.new_zeros(B, E)
    counts_BE.scatter_add_(1, top_BTK.flatten(1), affinities_BTE.new_ones(B, T * chosen))
    f_BE = counts_BE * (E / (chosen * T))
    return (f_BE * affinities_BTE.mean(1)).sum(-1).mean()


def max_violation(loads_ME: Tensor) -> Tensor:
    """Return MaxVio of every layer, `[M]`: (largest load - mean load) / mean load; 0 is balance.

    References: Wang et al., arXiv 2408.15664, section 4.1.
    """
    mean_M = loads_ME.mean(-1)
    return (loads_ME.amax(-1) - mean_M) / mean_M


def routing_statistics(loads_ME: Tensor, entropy_M: Tensor) -> dict[str, float]:
    """Return statistics of the routing of a step, over all layers.

    Args:
        loads_ME: loads of one step.
        entropy_M: mean over tokens of `router_entropy`.

    Returns:
        max_violation: MaxVio, mean over layers; max_violation_worst: of the worst layer;
        dead_experts: number of experts without tokens, over all layers; busiest_share,
        quietest_share: largest and smallest share of one expert in the choices of its layer, over
        all layers; entropy: mean over layers.
    """
    violation_M = max_violation(loads_ME)
    share_ME = loads_ME / loads_ME.sum(-1, keepdim=True)
    figures = {
        "max_violation": violation_M.mean(),
        "max_violation_worst": violation_M.max(),
        "dead_experts": (loads_ME == 0).sum().double(),
        "busiest_share": share_ME.max(),
        "quietest_share": share_ME.min(),
        "entropy": entropy_M.mean(),
    }
    values = torch.stack([value.double() for value in figures.values()]).tolist()
    return dict(zip(figures, values, strict=True)) | {"dead_experts": int(values[2])}
