"""QK-clip: scale query and key weights down where an attention logit has become too large.

After an optimizer step the weights of every head h whose largest logit S_h of that step is above a
threshold tau are scaled so that the same inputs give logits gamma_h times as large:

    gamma_h = min(1, tau / S_h)

A logit is a product of a query and a key, so that queries take gamma^alpha of it and keys
gamma^(1-alpha). Rotary positions turn a head's outputs and commute with a factor. Norms of queries
or keys after the projection would undo it: there is nothing to clip in such a model.

References:
    Kimi Team, Kimi K2, arXiv 2507.20534, section 2.1 and algorithm 1 (MuonClip).

Letters: H heads of queries, G heads of keys (H a multiple of G, R = H / G), D size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from muonscale.errors import ConfigError
from muonscale.optim.distributed.dtensor import local, part_here, sharding_of
from muonscale.optim.matrices.sharding import local_parts
from muonscale.optim.matrices.spec import PLAIN
from muonscale.optim.rules.master_weights import Weights

Masters = Mapping[Tensor, Tensor]
"""Float32 copies of parameters in 16 bits, by parameter, lying as these do."""


@dataclass(frozen=True)
class Outputs:
    """Outputs of a linear map, in all the tensors that make them."""

    tensors: tuple[Tensor, ...]
    """Weight and, if there is one, bias; plain or DTensor."""
    axis: int = 0
    """Along which the weight has its outputs: 0 `[out, in]`, -1 `[in, out]`."""
    first: int = 0
    """Outputs before these, where others are stacked in the same tensors."""


def clip_factors(largest_H: Tensor, tau: float) -> Tensor:
    """Return gamma of every head, `[H]` in (0, 1].

    A logit that is not finite says nothing of its head, whose factor is 1.

    Args:
        largest_H: largest logit of every head; may be 0 and below.
        tau: the threshold, above 0.

    Raises:
        ConfigError: for a threshold that is not above 0.
    """
    if not tau > 0:
        raise ConfigError(f"tau is {tau!r}: a logit above 0 is accepted")
    above_H = (largest_H > tau) & largest_H.isfinite()
    return torch.where(above_H, tau / torch.where(above_H, largest_H, 1.0), 1.0)


def grouped_factors(gamma_H: Tensor, key_heads: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the factors of query heads and key heads, `[H]` and `[G]`.

    Where R heads of queries share a key, the key takes what all of them need, the largest gamma
    c_g of the group, and each query what is left of its own:

        key_g = c_g^(1-alpha)        query_h = gamma_h / key_g

    Logits of every head are so scaled by its own gamma, and no other head's are changed. With one
    query for a key they are gamma^(1-alpha) and gamma^alpha.

    Args:
        gamma_H: see `clip_factors`.
        key_heads: G.
        alpha: the queries' part, from 0 to 1.

    Raises:
        ConfigError: for another alpha.
    """
    _check_alpha(alpha)
    gamma_GR = gamma_H.unflatten(0, (key_heads, -1))
    key_G = gamma_GR.amax(1) ** (1 - alpha)
    return (gamma_GR / key_G[:, None]).flatten(), key_G


def latent_factors(gamma_H: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of latent attention (MLA): query, rotary part of the query, key, each `[H]`.

    The rotary part of the key is shared by all heads and stays; that of the query takes all.

    Raises:
        ConfigError: for an alpha outside of [0, 1].
    """
    _check_alpha(alpha)
    return gamma_H**alpha, gamma_H, gamma_H ** (1 - alpha)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha!r}: a number from 0 to 1 is accepted")


@torch.no_grad()
def clip_grouped_(
    query: Outputs,
    key: Outputs,
    gamma_H: Tensor,
    *,
    key_heads: int,
    head_size: int,
    alpha: float = 0.5,
    masters: Masters | None = None,
) -> None:
    """Scale query and key heads of multi-head and grouped-query attention, in place.

    Args:
        query: `[H D]` outputs, head after head.
        key: `[G D]` outputs, likewise.
        gamma_H: see `clip_factors`, of all heads, on every rank that holds a part.
        key_heads: G.
        head_size: D.
        alpha: see `grouped_factors`.
        masters: see `Masters`.
    """
    query_H, key_G = grouped_factors(gamma_H, key_heads, alpha)
    scale_outputs_(query, query_H.repeat_interleave(head_size), masters)
    scale_outputs_(key, key_G.repeat_interleave(head_size), masters)


@torch.no_grad()
def clip_latent_(
    query: Outputs,
    key_value: Outputs,
    gamma_H: Tensor,
    *,
    sizes: tuple[int, int, int],
    alpha: float = 0.5,
    masters: Masters | None = None,
) -> None:
    """Scale the heads of latent attention (DeepSeek's MLA), in place; values stay as they are.

    Args:
        query: for every head its query, then the rotary part of it.
        key_value: for every head its key, then its value: the expansion of the latent vector.
        gamma_H: see `clip_factors`, of all heads, on every rank that holds a part.
        sizes: of a head's query (and key) without the rotary part, of that part, of its value.
        alpha: see `latent_factors`.
        masters: see `Masters`.
    """
    plain, rotary, value = sizes
    query_H, rotary_H, key_H = latent_factors(gamma_H, alpha)
    scale_outputs_(query, _interleave((query_H, plain), (rotary_H, rotary)), masters)
    untouched_H = torch.ones_like(gamma_H)
    scale_outputs_(key_value, _interleave((key_H, plain), (untouched_H, value)), masters)


def _interleave(*parts: tuple[Tensor, int]) -> Tensor:
    """Return the factors of the outputs of every head, part after part."""
    return torch.cat([f_H[:, None].expand(-1, size) for f_H, size in parts], dim=1).flatten()


@torch.no_grad()
def scale_outputs_(outputs: Outputs, factors_N: Tensor, masters: Masters | None = None) -> None:
    """Multiply outputs of a linear map by a factor each, in place, what of them is here.

    A float32 master is multiplied, and its 16-bit parameter rounded from it.

    Args:
        outputs: N of them.
        factors_N: on any device.
        masters: see `Masters`.
    """
    for tensor in outputs.tensors:
        axis = outputs.axis % tensor.ndim
        factors = factors_N.new_ones(tensor.shape[axis])
        factors[outputs.first : outputs.first + len(factors_N)] = factors_N
        here = _here(tensor, axis, factors)
        shape = [-1 if i == axis else 1 for i in range(tensor.ndim)]
        master = None if masters is None else masters.get(tensor)
        weights = Weights(
            stored=[local(tensor.detach())],
            masters=None if master is None else [local(master)],
        )
        wide = torch.empty(0, dtype=torch.promote_types(tensor.dtype, torch.float32))
        values = weights.wide([wide], None)
        values[0].mul_(here.to(values[0]).view(shape))
        weights.write_(values, None)


def _here(tensor: Tensor, axis: int, factors: Tensor) -> Tensor:
    """Return the factors of the rows that are on this rank, in their order there."""
    part = part_here(sharding_of("queries or keys", tensor, PLAIN))
    if part is None:
        return factors
    ranges = [factors[slice(*one.range)] for one in local_parts(*part)[axis]]
    return torch.cat([factors[:0], *ranges])
