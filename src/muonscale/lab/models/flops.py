"""Floating-point operations of a model per token, and of an optimizer per step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.models.structure import expert_modules, lookup_tables, output_head
from muonscale.optim.matrices.batches import cached_matrix_shapes
from muonscale.optim.matrices.spec import PLAIN
from muonscale.optim.rules.base import rule_of
from muonscale.optim.rules.step_inputs import named


def active_elements(config: PreTrainedConfig, model: PreTrainedModel) -> dict[str, int] | None:
    """Return how many elements of each parameter a token uses, by name: k of the E routed experts.

    Returns:
        The numbers, or None if the configuration does not say how many experts a token uses
        (`num_experts_per_tok`), or experts are not stacked parameters `[E, ...]`.
    """
    stacks = {
        id(p): p.shape[0]
        for module in expert_modules(model).values()
        for p in module.parameters(recurse=False)
    }
    chosen = getattr(config, "num_experts_per_tok", None)
    if chosen is None:
        return None if stacks else {name: p.numel() for name, p in model.named_parameters()}
    if not stacks:
        return None
    return {
        name: p.numel() // stacks[id(p)] * chosen if id(p) in stacks else p.numel()
        for name, p in model.named_parameters()
    }


def active_parameters(config: PreTrainedConfig, model: PreTrainedModel) -> int | None:
    """Return the number of parameters that a token uses, without embeddings and head, or None."""
    active = active_elements(config, model)
    if active is None:
        return None
    outside = lookup_tables(model) | output_head(model)
    return sum(active[name] for name, p in model.named_parameters() if id(p) not in outside)


def matrix_flops_per_token(
    config: PreTrainedConfig, model: PreTrainedModel
) -> dict[str, int] | None:
    """Return 6 * N by parameter, 0 for embeddings that are only looked up; None if unknown."""
    active = active_elements(config, model)
    if active is None:
        return None
    looked_up = lookup_tables(model) - output_head(model)
    return {
        name: 0 if id(p) in looked_up else 6 * active[name] for name, p in model.named_parameters()
    }


def unknown_experts(config: PreTrainedConfig) -> ConfigError:
    """Return the error for a mixture of experts whose active experts are not known."""
    return ConfigError(
        f"model_type {config.model_type!r}: the configuration does not say how many experts a "
        "token uses, so its FLOPs cannot be counted; accepted: stacked experts and "
        "num_experts_per_tok"
    )


def attention_flops_per_token(config: PreTrainedConfig, sequence_length: int) -> int:
    """Return the operations of attention itself: 6 * layers * heads * (qk + v) * sequence_length.

    `qk` and `v` are the sizes of a head's keys and values, which differ in latent attention.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    qk = v = head_dim
    if hasattr(config, "qk_nope_head_dim"):  # latent attention; its head_dim is the rotary part
        qk, v = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return 6 * config.num_hidden_layers * heads * (qk + v) * sequence_length


def flops_per_token(
    config: PreTrainedConfig, model: PreTrainedModel, sequence_length: int
) -> int | None:
    """Return the floating-point operations of one training token, forward and backward.

        6 * N + 6 * layers * heads * (qk + v) * sequence_length

    N counts every parameter that a token uses except embeddings that are only looked up; a tied one
    is also the matrix of the head, and counts. The second term is that of attention, counted
    without the causal mask: with heads of one size, 12 * layers * heads * head_dim.

    Returns:
        The operations, or None for a mixture of experts whose configuration does not say how many
        experts a token uses.

    References:
        Kaplan et al. 2020, arXiv 2001.08361, section 2.1 (6 N);
        Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B (attention).
    """
    matrices = matrix_flops_per_token(config, model)
    if matrices is None:
        return None
    return sum(matrices.values()) + attention_flops_per_token(config, sequence_length)


def optimizer_flops(param_groups: Iterable[Mapping[str, Any]]) -> int:
    """Return the operations of matrix products in one step on one process, a CPU, in float32."""
    total = 0
    for group in param_groups:
        update = rule_of(group).matrix_update(group)
        if update is None:
            continue
        for name, parameter in named(group):
            spec = group["matrices"].get(name, PLAIN)
            total += sum(
                count * update.flops((out, in_), torch.float32, "cpu")
                for count, out, in_ in cached_matrix_shapes(tuple(parameter.shape), spec)
            )
    return total
