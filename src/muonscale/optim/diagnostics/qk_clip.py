"""QK-clip: scales query and key weights down if an attention logit is too large.

After an optimizer step, heads whose largest logit S_h of that step exceeds a threshold tau are
scaled. The same inputs then give logits gamma_h times as large:

    gamma_h = min(1, tau / S_h)

A logit is a product of a query and a key: queries are multiplied by gamma^alpha and keys by
gamma^(1-alpha). Rotary embeddings commute with a factor. QK-clip has no effect on models that
normalize queries or keys after the projection.

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
from muonscale.optim.distributed.dtensor import part_here, sharding_of, to_local
from muonscale.optim.matrices.sharding import local_parts
from muonscale.optim.matrices.spec import PLAIN
from muonscale.optim.rules.master_weights import Weights

Masters = Mapping[Tensor, Tensor]
"""Float32 copies of 16-bit parameters, by parameter and with the same sharding."""


@dataclass(frozen=True)
class Outputs:
    """A range of outputs of a linear map."""

    tensors: tuple[Tensor, ...]
    """The weight and, if there is one, the bias; plain tensors or DTensors."""
    axis: int = 0
    """Axis of the outputs in the weight: 0 for `[out, in]`, -1 for `[in, out]`."""
    first: int = 0
    """Index of the first output in the tensors."""


def clip_factors(largest_H: Tensor, tau: float) -> Tensor:
    """Return gamma of every head, `[H]` in (0, 1]. It is 1 for a logit that is not finite.

    Args:
        largest_H: largest logit of every head, of any sign.
        tau: threshold, above 0.

    Raises:
        ConfigError: if `tau` is not above 0.
    """
    if not tau > 0:
        raise ConfigError(f"tau is {tau!r}: it must be above 0")
    above_H = (largest_H > tau) & largest_H.isfinite()
    return torch.where(above_H, tau / torch.where(above_H, largest_H, 1.0), 1.0)


def grouped_factors(gamma_H: Tensor, key_heads: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the factors of query heads and key heads, `[H]` and `[G]`.

    R query heads share a key head. With c_g the largest gamma of group g:

        key_g = c_g^(1-alpha)        query_h = gamma_h / key_g

    The logits of every head are multiplied by its own gamma. With one query head per key head, the
    factors are gamma^(1-alpha) and gamma^alpha.

    Args:
        gamma_H: see `clip_factors`.
        key_heads: G.
        alpha: exponent of the queries, from 0 to 1.

    Raises:
        ConfigError: if `alpha` is not from 0 to 1.
    """
    _check_alpha(alpha)
    gamma_GR = gamma_H.unflatten(0, (key_heads, -1))
    key_G = gamma_GR.amax(1) ** (1 - alpha)
    return (gamma_GR / key_G[:, None]).flatten(), key_G


def latent_factors(gamma_H: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors `[H]` of latent attention (MLA): query, its rotary part, and key.

    All heads share the rotary part of the key, which is not scaled. The rotary part of the query is
    therefore multiplied by gamma.

    Raises:
        ConfigError: if `alpha` is not from 0 to 1.
    """
    _check_alpha(alpha)
    return gamma_H**alpha, gamma_H, gamma_H ** (1 - alpha)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha!r}: it must be from 0 to 1")


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
        query: H * D outputs, head after head.
        key: G * D outputs, head after head.
        gamma_H: see `clip_factors`. Every rank that holds a part needs those of all heads.
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
    """Scale queries and keys of latent attention (DeepSeek's MLA), in place. Values do not change.

    Args:
        query: for every head its query, then the rotary part of the query.
        key_value: for every head its key, then its value: the expansion of the latent vector.
        gamma_H: see `clip_factors`. Every rank that holds a part needs those of all heads.
        sizes: sizes of a head's query (and key) without the rotary part, of the rotary part, and of
            its value.
        alpha: see `latent_factors`.
        masters: see `Masters`.
    """
    plain, rotary, value = sizes
    query_H, rotary_H, key_H = latent_factors(gamma_H, alpha)
    scale_outputs_(query, _interleave((query_H, plain), (rotary_H, rotary)), masters)
    untouched_H = torch.ones_like(gamma_H)
    scale_outputs_(key_value, _interleave((key_H, plain), (untouched_H, value)), masters)


def _interleave(*parts: tuple[Tensor, int]) -> Tensor:
    """Return the factors of all outputs: for every head, one part after the other."""
    return torch.cat([f_H[:, None].expand(-1, size) for f_H, size in parts], dim=1).flatten()


@torch.no_grad()
def scale_outputs_(outputs: Outputs, factors_N: Tensor, masters: Masters | None = None) -> None:
    """Multiply N outputs of a linear map by one factor each, in place, on this rank.

    A float32 master is multiplied, and the 16-bit parameter is rounded from it.

    Args:
        outputs: range of N outputs.
        factors_N: factors, on any device.
        masters: see `Masters`.
    """
    for tensor in outputs.tensors:
        axis = outputs.axis % tensor.ndim
        factors = factors_N.new_ones(tensor.shape[axis])
        factors[outputs.first : outputs.first + len(factors_N)] = factors_N
        here = _select_local(tensor, axis, factors)
        shape = [-1 if i == axis else 1 for i in range(tensor.ndim)]
        master = None if masters is None else masters.get(tensor)
        weights = Weights(
            stored=[to_local(tensor.detach())],
            masters=None if master is None else [to_local(master)],
        )
        wide = torch.empty(0, dtype=torch.promote_types(tensor.dtype, torch.float32))
        values = weights.wide([wide])
        values[0].mul_(here.to(values[0]).view(shape))
        weights.write_(values)


def _select_local(tensor: Tensor, axis: int, factors: Tensor) -> Tensor:
    """Return the factors of the outputs that are on this rank, in local order."""
    part = part_here(sharding_of("queries or keys", tensor, PLAIN))
    if part is None:
        return factors
    ranges = [factors[slice(*p.range)] for p in local_parts(*part)[axis]]
    return torch.cat([factors[:0], *ranges])
