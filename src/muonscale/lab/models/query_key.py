"""The query and key weights in transformers' attention modules, for QK-clip."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.models.attention import attention_modules
from muonscale.optim.diagnostics.qk_clip import Masters, Outputs, clip_grouped_, clip_latent_

Clip = Callable[[Tensor, float, Masters | None], None]
"""Scales the heads of an attention module; its arguments are gamma `[H]`, alpha and the masters."""


def _outputs(linear: nn.Module) -> Outputs:
    return Outputs(tuple(linear.parameters(recurse=False)))


def _clip_separate(module: Any, gamma_H: Tensor, alpha: float, masters: Masters | None) -> None:
    """Clip `q_proj` and `k_proj`, ordered by head; keys may have fewer heads."""
    size = module.head_dim
    clip_grouped_(
        _outputs(module.q_proj),
        _outputs(module.k_proj),
        gamma_H,
        key_heads=module.k_proj.weight.shape[0] // size,
        head_size=size,
        alpha=alpha,
        masters=masters,
    )


def _clip_fused(module: Any, gamma_H: Tensor, alpha: float, masters: Masters | None) -> None:
    """Clip GPT-2's `c_attn`, a Conv1D: queries, keys, values."""
    tensors, heads = tuple(module.c_attn.parameters(recurse=False)), len(gamma_H)
    width = module.c_attn.weight.shape[1] // 3
    clip_grouped_(
        Outputs(tensors, axis=-1),
        Outputs(tensors, axis=-1, first=width),
        gamma_H,
        key_heads=heads,
        head_size=width // heads,
        alpha=alpha,
        masters=masters,
    )


def _clip_latent(module: Any, gamma_H: Tensor, alpha: float, masters: Masters | None) -> None:
    """Clip DeepSeek's multi-head latent attention, with or without a low-rank query."""
    clip_latent_(
        _outputs(getattr(module, "q_proj", None) or module.q_b_proj),
        _outputs(module.kv_b_proj),
        gamma_H,
        sizes=(module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim),
        alpha=alpha,
        masters=masters,
    )


CLIPS: dict[str, Callable[..., None]] = {
    "DeepseekV3Attention": _clip_latent,
    "GPT2Attention": _clip_fused,
    "LlamaAttention": _clip_separate,
    "MistralAttention": _clip_separate,
    "MixtralAttention": _clip_separate,
    "Qwen2Attention": _clip_separate,
    "Qwen2MoeAttention": _clip_separate,
}
"""Clip functions of the supported attention modules of transformers, by class."""

NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
"""Names of the norms of queries and keys in attention modules."""


def query_key_clips(model: PreTrainedModel) -> list[Clip]:
    """Return the `Clip` of every attention module, in the order of `attention_modules`.

    Raises:
        ConfigError: for a model that normalizes queries or keys, or that is not supported.
    """
    kind = model.config.model_type
    clips: list[Clip] = []
    for name, module in attention_modules(model).items():
        cls = type(module)
        normed = next((n for n in NORMS if getattr(module, n, None) is not None), "")
        if normed:
            raise ConfigError(
                f"optimizer.qk_clip: model_type {kind!r} normalizes queries or keys after their "
                f"projections ({name}.{normed}), so scaling these changes no logit; accepted: null"
            )
        if not cls.__module__.startswith("transformers.") or cls.__name__ not in CLIPS:
            raise ConfigError(
                f"optimizer.qk_clip: {cls.__name__} of model_type {kind!r} is not supported; "
                f"accepted: null, or {', '.join(CLIPS)}"
            )
        clips.append(partial(CLIPS[cls.__name__], module))
    return clips
